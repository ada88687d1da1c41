package main

// protocols/announce/1.0.0

import (
	"context"
	"fmt"
	"io"
	"time"

	pubsub "github.com/libp2p/go-libp2p-pubsub"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/record"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/multiformats/go-varint"
	"github.com/vmihailenco/msgpack/v5"
	"google.golang.org/protobuf/proto"
)

type serviceData struct {
	ServiceID   string   `msgpack:"ServiceID"`
	Models      []string `msgpack:"Models"`
	InFlight    uint64   `msgpack:"InFlight"`
	MaxInFlight uint64   `msgpack:"MaxInFlight"`
	Healthy     bool     `msgpack:"Healthy"`
}

type nodeData struct {
	ID            string        `msgpack:"ID"`
	Name          string        `msgpack:"Name"`
	ServiceID     string        `msgpack:"ServiceID"`
	LastSeen      uint64        `msgpack:"LastSeen"`
	AvailableVRAM uint64        `msgpack:"AvailableVRAM"`
	Services      []serviceData `msgpack:"Services"`
	Addrs         []string      `msgpack:"Addrs"`
	Seq           uint64        `msgpack:"Seq"`
	Version       string        `msgpack:"Version"`
}

func (n *nodeData) Domain() string                   { return "meshnode-announce" }
func (n *nodeData) Codec() []byte                    { return []byte("/meshnode/announce/1.0.0") }
func (n *nodeData) MarshalRecord() ([]byte, error)   { return msgpack.Marshal(n) }
func (n *nodeData) UnmarshalRecord(raw []byte) error { return msgpack.Unmarshal(raw, n) }

// announceForever joins the topic, says what this node is every second, and tells what it hears.
func (m *meshPeer) announceForever(ctx context.Context) error {
	router, err := pubsub.NewGossipSub(ctx, m.host, pubsub.WithMessageSignaturePolicy(pubsub.StrictSign))
	if err != nil {
		return err
	}
	topic, err := router.Join(fmt.Sprintf("/meshnode/%s/announce/1.0.0", m.network))
	if err != nil {
		return err
	}
	heard, err := topic.Subscribe()
	if err != nil {
		return err
	}
	go func() {
		for {
			got, err := heard.Next(ctx)
			if err != nil {
				return
			}
			if got.GetFrom() != m.host.ID() {
				m.hear(got)
			}
		}
	}()
	go func() {
		seq := uint64(time.Now().UnixMilli())
		for ctx.Err() == nil {
			if sealed, err := m.announcement(seq); err == nil {
				_ = topic.Publish(ctx, sealed)
			}
			seq++
			time.Sleep(time.Second)
		}
	}()
	return nil
}

func (m *meshPeer) announcement(seq uint64) ([]byte, error) {
	node := &nodeData{
		ID: m.host.ID().String(), Name: "gopher", ServiceID: "go", Seq: seq, Version: "go",
		LastSeen: uint64(time.Now().UnixMilli()), AvailableVRAM: 1 << 40,
		Services: []serviceData{{ServiceID: "go", Models: []string{"m"}, Healthy: true}},
		Addrs:    []string{},
	}
	for _, addr := range m.host.Addrs() {
		node.Addrs = append(node.Addrs, fmt.Sprintf("%s/p2p/%s", addr, m.host.ID()))
	}
	envelope, err := record.Seal(node, m.host.Peerstore().PrivKey(m.host.ID()))
	if err != nil {
		return nil, err
	}
	return envelope.Marshal()
}

func (m *meshPeer) hear(got *pubsub.Message) {
	var node nodeData
	envelope, err := record.ConsumeTypedEnvelope(got.Data, &node)
	if err != nil {
		tell("heard", map[string]any{"error": err.Error()})
		return
	}
	signer, err := peer.IDFromPublicKey(envelope.PublicKey)
	if err != nil || signer != got.GetFrom() || signer.String() != node.ID {
		tell("heard", map[string]any{"error": "wrong_signer"})
		return
	}
	tell("heard", map[string]any{
		"peer": node.ID, "name": node.Name, "seq": node.Seq, "addrs": node.Addrs,
		"services": len(node.Services), "vram": node.AvailableVRAM,
	})
}

// identify asks a member what it is and speaks.
func (m *meshPeer) identify(ctx context.Context, id peer.ID) (map[string]any, error) {
	stream, err := m.host.NewStream(ctx, id, identify.ID)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	_ = stream.SetDeadline(time.Now().Add(patience))
	raw, err := io.ReadAll(io.LimitReader(stream, 64<<10))
	if err != nil {
		return nil, err
	}
	length, used, err := varint.FromUvarint(raw)
	if err != nil || uint64(len(raw)-used) < length {
		return nil, fmt.Errorf("no identify message in %d bytes", len(raw))
	}
	var said identifypb.Identify
	if err := proto.Unmarshal(raw[used:uint64(used)+length], &said); err != nil {
		return nil, err
	}
	return map[string]any{"protocols": said.Protocols, "agent": said.GetAgentVersion()}, nil
}
