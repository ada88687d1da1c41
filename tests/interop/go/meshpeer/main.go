// A member of a meshnode network in Go, written from the protocols/ folder alone.
//
//	meshpeer KEY_HEX NETWORK    joins as JSON commands on standard input say, one a line, and tells
//	                            what happens as JSON events on standard output, until input ends
//
// Commands, by "do": dial {addr}; ping, protocols, leave {peer}; tunnel {peer, service, data, cut};
// reserve {addr}. Data is base64. Each is answered by one event of the same name, with "error" if it failed.
// Told unasked: ready, member, refused, heard.
package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
)

const patience = 10 * time.Second

type meshPeer struct {
	host    host.Host
	key     []byte
	network string

	lock    sync.Mutex
	members map[peer.ID]bool
}

type command struct {
	Do      string `json:"do"`
	Addr    string `json:"addr"`
	Peer    string `json:"peer"`
	Service string `json:"service"`
	Data    []byte `json:"data"`
	Cut     bool   `json:"cut"`
}

var output sync.Mutex

func tell(event string, fields map[string]any) {
	if fields == nil {
		fields = map[string]any{}
	}
	fields["event"] = event
	output.Lock()
	defer output.Unlock()
	_ = json.NewEncoder(os.Stdout).Encode(fields)
}

func (m *meshPeer) admit(id peer.ID) {
	m.lock.Lock()
	m.members[id] = true
	m.lock.Unlock()
	tell("member", map[string]any{"peer": id.String()})
}

func (m *meshPeer) isMember(id peer.ID) bool {
	m.lock.Lock()
	defer m.lock.Unlock()
	return m.members[id]
}

// dial connects, and proves membership before anything else.
func (m *meshPeer) dial(ctx context.Context, addr string) (map[string]any, error) {
	info, err := peer.AddrInfoFromString(addr)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if err := m.host.Connect(ctx, *info); err != nil {
		return nil, err
	}
	connected := time.Since(start)
	if err := m.proveAsDialler(ctx, info.ID); err != nil {
		_ = m.host.Network().ClosePeer(info.ID)
		return nil, err
	}
	m.admit(info.ID)
	conns := m.host.Network().ConnsToPeer(info.ID)
	return map[string]any{
		"peer":       info.ID.String(),
		"connect_ms": connected.Milliseconds(),
		"remote":     conns[0].RemoteMultiaddr().String(),
	}, nil
}

func (m *meshPeer) ping(ctx context.Context, id peer.ID) (map[string]any, error) {
	select {
	case result := <-ping.Ping(ctx, m.host, id):
		return map[string]any{"rtt_ms": float64(result.RTT.Microseconds()) / 1e3}, result.Error
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// protocols asks by identify; go's own, automatic question came before membership was proven.
func (m *meshPeer) protocols(ctx context.Context, id peer.ID) (map[string]any, error) {
	return m.identify(ctx, id)
}

func (m *meshPeer) reserve(ctx context.Context, addr string) (map[string]any, error) {
	info, err := peer.AddrInfoFromString(addr)
	if err != nil {
		return nil, err
	}
	reservation, err := client.Reserve(ctx, m.host, *info)
	if err != nil {
		return nil, err
	}
	return map[string]any{
		"expires_s": time.Until(reservation.Expiration).Seconds(),
		"addrs":     len(reservation.Addrs),
		"limited":   reservation.LimitDuration > 0 || reservation.LimitData > 0,
	}, nil
}

func (m *meshPeer) run(ctx context.Context, c command) (map[string]any, error) {
	var id peer.ID
	if c.Peer != "" {
		var err error
		if id, err = peer.Decode(c.Peer); err != nil {
			return nil, err
		}
	}
	switch c.Do {
	case "dial":
		return m.dial(ctx, c.Addr)
	case "ping":
		return m.ping(ctx, id)
	case "protocols":
		return m.protocols(ctx, id)
	case "reserve":
		return m.reserve(ctx, c.Addr)
	case "tunnel":
		return m.tunnel(ctx, id, c.Service, c.Data, c.Cut)
	case "leave":
		return nil, m.host.Network().ClosePeer(id)
	}
	return nil, fmt.Errorf("unknown command %q", c.Do)
}

func live(keyHex, networkName string) error {
	key, err := hex.DecodeString(keyHex)
	if err != nil || len(key) != 32 {
		return fmt.Errorf("the key is 32 bytes in hexadecimal")
	}
	node, err := libp2p.New(
		libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"),
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Security(noise.ID, noise.New),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.EnableRelay(),
	)
	if err != nil {
		return err
	}
	defer node.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	m := &meshPeer{host: node, key: key, network: networkName, members: map[peer.ID]bool{}}
	node.SetStreamHandler(membershipID, m.answerMembership)
	node.SetStreamHandler(tunnelID, m.serveTunnel)
	node.Network().Notify(&network.NotifyBundle{
		DisconnectedF: func(n network.Network, conn network.Conn) {
			if n.Connectedness(conn.RemotePeer()) != network.Connected {
				m.lock.Lock()
				delete(m.members, conn.RemotePeer())
				m.lock.Unlock()
			}
		},
	})
	if err := m.announceForever(ctx); err != nil {
		return err
	}
	tell("ready", map[string]any{
		"peer": node.ID().String(),
		"addr": fmt.Sprintf("%s/p2p/%s", node.Addrs()[0], node.ID()),
	})
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var c command
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return err
		}
		limited, done := context.WithTimeout(network.WithAllowLimitedConn(ctx, "mesh"), patience)
		fields, err := m.run(limited, c)
		done()
		if fields == nil {
			fields = map[string]any{}
		}
		if err != nil {
			fields["error"] = err.Error()
		}
		tell(c.Do, fields)
	}
	return lines.Err()
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: meshpeer KEY_HEX NETWORK")
		os.Exit(2)
	}
	if err := live(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}
