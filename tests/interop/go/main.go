// A go-libp2p peer to test and to measure against: TCP, noise, yamux, nothing else.
//
//	peer serve          prints {"addr": …} and serves /bench/echo/1 and /bench/sink/1 until stdin ends
//	peer bench ADDR     measures against such a server and prints one JSON object
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sort"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
)

const (
	echoProtocol = protocol.ID("/bench/echo/1")
	sinkProtocol = protocol.ID("/bench/sink/1")
)

func newHost(listen string) (host.Host, error) {
	// The default limits would refuse the 1,000 streams that the measurement opens.
	manager, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
	if err != nil {
		return nil, err
	}
	options := []libp2p.Option{
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Security(noise.ID, noise.New),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.ResourceManager(manager),
		libp2p.DisableRelay(),
	}
	if listen == "" {
		options = append(options, libp2p.NoListenAddrs)
	} else {
		options = append(options, libp2p.ListenAddrStrings(listen))
	}
	return libp2p.New(options...)
}

func echo(stream network.Stream) {
	defer stream.Close()
	if _, err := io.Copy(stream, stream); err != nil {
		_ = stream.Reset()
	}
}

// sink answers with the number of bytes it read, once the other side has half-closed.
func sink(stream network.Stream) {
	defer stream.Close()
	n, err := io.Copy(io.Discard, stream)
	if err != nil {
		_ = stream.Reset()
		return
	}
	_ = binary.Write(stream, binary.BigEndian, uint64(n))
}

func serve() error {
	node, err := newHost("/ip4/127.0.0.1/tcp/0")
	if err != nil {
		return err
	}
	defer node.Close()
	node.SetStreamHandler(echoProtocol, echo)
	node.SetStreamHandler(sinkProtocol, sink)
	addr := fmt.Sprintf("%s/p2p/%s", node.Addrs()[0], node.ID())
	if err := json.NewEncoder(os.Stdout).Encode(map[string]string{"addr": addr}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, bufio.NewReader(os.Stdin))
	return err
}

func median(values []float64) float64 {
	sort.Float64s(values)
	return values[len(values)/2]
}

func roundTrip(stream network.Stream, message, buffer []byte) error {
	if _, err := stream.Write(message); err != nil {
		return err
	}
	_, err := io.ReadFull(stream, buffer)
	return err
}

func bench(addr string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	info, err := peer.AddrInfoFromString(addr)
	if err != nil {
		return err
	}
	node, err := newHost("")
	if err != nil {
		return err
	}
	defer node.Close()
	message, buffer := make([]byte, 64), make([]byte, 64)

	connects := make([]float64, 0, 7)
	for range 7 {
		_ = node.Network().ClosePeer(info.ID)
		start := time.Now()
		if err := node.Connect(ctx, *info); err != nil {
			return err
		}
		connects = append(connects, time.Since(start).Seconds()*1e3)
	}

	opens := make([]float64, 0, 200)
	for range 200 {
		start := time.Now()
		stream, err := node.NewStream(ctx, info.ID, echoProtocol)
		if err != nil {
			return err
		}
		if err := roundTrip(stream, message, buffer); err != nil {
			return err
		}
		opens = append(opens, time.Since(start).Seconds()*1e3)
		_ = stream.Close()
	}

	stream, err := node.NewStream(ctx, info.ID, echoProtocol)
	if err != nil {
		return err
	}
	pings := make([]float64, 0, 1000)
	for range 1000 {
		start := time.Now()
		if err := roundTrip(stream, message, buffer); err != nil {
			return err
		}
		pings = append(pings, time.Since(start).Seconds()*1e3)
	}
	_ = stream.Close()

	const total, piece = 200 << 20, 1 << 20
	stream, err = node.NewStream(ctx, info.ID, sinkProtocol)
	if err != nil {
		return err
	}
	block := make([]byte, piece)
	start := time.Now()
	for sent := 0; sent < total; sent += piece {
		if _, err := stream.Write(block); err != nil {
			return err
		}
	}
	_ = stream.CloseWrite()
	var counted uint64
	if err := binary.Read(stream, binary.BigEndian, &counted); err != nil {
		return err
	}
	if counted != total {
		return fmt.Errorf("sent %d bytes, the peer counted %d", total, counted)
	}
	bulk := float64(total) / 1e6 / time.Since(start).Seconds()

	const streams, trips = 1000, 10
	open := make([]network.Stream, 0, streams)
	for range streams {
		stream, err := node.NewStream(ctx, info.ID, echoProtocol)
		if err != nil {
			return err
		}
		open = append(open, stream)
	}
	var group sync.WaitGroup
	failures := make(chan error, streams)
	start = time.Now()
	for _, stream := range open {
		group.Add(1)
		go func() {
			defer group.Done()
			buffer := make([]byte, 64)
			for range trips {
				if err := roundTrip(stream, message, buffer); err != nil {
					failures <- err
					return
				}
			}
		}()
	}
	group.Wait()
	if len(failures) > 0 {
		return <-failures
	}
	rate := streams * trips / time.Since(start).Seconds()

	return json.NewEncoder(os.Stdout).Encode(map[string]float64{
		"connect_ms":      median(connects),
		"open_ms":         median(opens),
		"ping_pong_ms":    median(pings),
		"one_stream_mb_s": bulk,
		"streams_trips_s": rate,
	})
}

func main() {
	var err error
	switch {
	case len(os.Args) == 2 && os.Args[1] == "serve":
		err = serve()
	case len(os.Args) == 3 && os.Args[1] == "bench":
		err = bench(os.Args[2])
	default:
		err = fmt.Errorf("usage: peer serve | peer bench ADDR")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}
