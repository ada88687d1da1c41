package main

// protocols/tunnel/2.0.0

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

const (
	tunnelID       = protocol.ID("/meshnode/tunnel/2.0.0")
	maxChunk       = 65505
	maxHeaderBody  = 2048
	markEnd        = 0x0000
	markDone       = 0xFFFE
	markHeader     = 0xFFFF
	goService      = "go"
	tunnelPatience = 20 * time.Second
)

type tunnelRequest struct {
	ServiceID string `msgpack:"ServiceID"`
	Fresh     bool   `msgpack:"Fresh"`
}

type tunnelReply struct {
	Status        string `msgpack:"Status"`
	InFlight      uint64 `msgpack:"InFlight"`
	AvailableVRAM uint64 `msgpack:"AvailableVRAM"`
	Message       string `msgpack:"Message"`
}

func writeMark(w io.Writer, mark uint16) error { return binary.Write(w, binary.BigEndian, mark) }

func writeChunks(w io.Writer, data []byte) error {
	for len(data) > 0 {
		size := min(len(data), maxChunk)
		if err := writeMark(w, uint16(size)); err != nil {
			return err
		}
		if _, err := w.Write(data[:size]); err != nil {
			return err
		}
		data = data[size:]
	}
	return nil
}

// readBody passes on chunks until END. A stream that ends without it was cut.
func readBody(r io.Reader, take func([]byte)) error {
	for {
		var mark uint16
		if err := binary.Read(r, binary.BigEndian, &mark); err != nil {
			return fmt.Errorf("cut: %w", err)
		}
		if mark == markEnd {
			return nil
		}
		if mark > maxChunk {
			return fmt.Errorf("mark %#x inside a body", mark)
		}
		chunk := make([]byte, mark)
		if _, err := io.ReadFull(r, chunk); err != nil {
			return fmt.Errorf("cut: %w", err)
		}
		take(chunk)
	}
}

// serveTunnel answers each request on a stream with the SHA-256 of what came before its END.
func (m *meshPeer) serveTunnel(stream network.Stream) {
	if !m.isMember(stream.Conn().RemotePeer()) {
		_ = stream.Reset()
		return
	}
	reader := bufio.NewReader(stream)
	for {
		var mark uint16
		if err := binary.Read(reader, binary.BigEndian, &mark); err != nil {
			_ = stream.Close()
			return
		}
		if mark == markDone {
			continue
		}
		if err := serveRequest(stream, reader, mark); err != nil {
			_ = stream.Reset()
			return
		}
	}
}

func serveRequest(stream network.Stream, reader *bufio.Reader, mark uint16) error {
	if mark != markHeader {
		return fmt.Errorf("out_of_turn: mark %#x", mark)
	}
	var request tunnelRequest
	if err := readFrame(reader, maxHeaderBody, &request); err != nil {
		return err
	}
	if request.ServiceID != goService {
		return errors.Join(writeMark(stream, markHeader), writeFrame(stream, tunnelReply{Status: "no_such_service"}))
	}
	if err := errors.Join(writeMark(stream, markHeader), writeFrame(stream, tunnelReply{Status: "ok"})); err != nil {
		return err
	}
	digest := sha256.New()
	if err := readBody(reader, func(chunk []byte) { digest.Write(chunk) }); err != nil {
		return err
	}
	answer := []byte(hex.EncodeToString(digest.Sum(nil)))
	return errors.Join(writeChunks(stream, answer), writeMark(stream, markEnd))
}

// tunnel sends data to a service of a peer, half-closes, and returns the whole answer; with cut it
// resets after the first bytes of the answer instead.
func (m *meshPeer) tunnel(ctx context.Context, id peer.ID, service string, data []byte, cut bool) (map[string]any, error) {
	stream, err := m.host.NewStream(ctx, id, tunnelID)
	if err != nil {
		return nil, err
	}
	_ = stream.SetDeadline(time.Now().Add(tunnelPatience))
	reader := bufio.NewReader(stream)
	if err := errors.Join(writeMark(stream, markHeader), writeFrame(stream, tunnelRequest{ServiceID: service})); err != nil {
		return nil, err
	}
	var mark uint16
	if err := binary.Read(reader, binary.BigEndian, &mark); err != nil || mark != markHeader {
		return nil, fmt.Errorf("no reply: mark %#x, %v", mark, err)
	}
	var reply tunnelReply
	if err := readFrame(reader, maxHeaderBody, &reply); err != nil {
		return nil, err
	}
	result := map[string]any{"status": reply.Status}
	if reply.Status != "ok" {
		return result, stream.Close()
	}
	if err := writeChunks(stream, data); err != nil {
		return nil, err
	}
	if cut {
		return result, stream.Reset()
	}
	if err := writeMark(stream, markEnd); err != nil {
		return nil, err
	}
	var answer []byte
	err = readBody(reader, func(chunk []byte) { answer = append(answer, chunk...) })
	result["answer"] = string(answer)
	return result, errors.Join(err, stream.Close())
}
