"""Every metric of a node, on a registry of its own; each part counts on what it is handed.

A metric lives here, and not in the room that counts it, so that its name stands in one place
beside its help text. Peer IDs are never labels: a mesh of ten thousand would make as many series.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Tunnels open in milliseconds on a LAN, and in seconds when several peers are tried.
_OPEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# A first token takes tens of milliseconds warm, and minutes behind a queue.
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
# A place comes free in milliseconds under short requests, and in a minute behind long answers.
_WAIT_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0)
_LAG_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Metrics:
    """The counters, gauges and histograms of one node."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.peers = Gauge(
            "meshnode_peers", "Nodes in the ledger, this one included", ["state"], registry=registry
        )
        self.announcements = Counter(
            "meshnode_announcements_total",
            "Announcements sent and accepted",
            ["direction"],  # sent, received
            registry=registry,
        )
        self.announcements_rejected = Counter(
            "meshnode_announcements_rejected_total",
            "Announcements dropped, by the error code of protocols/announce",
            ["reason"],
            registry=registry,
        )
        self.available_vram_bytes = Gauge(
            "meshnode_available_vram_bytes",
            "Free GPU memory of this host; NaN while unknown",
            registry=registry,
        )
        self.in_flight = Gauge(
            "meshnode_in_flight",
            "Requests that this host's services are serving now",
            ["service"],
            registry=registry,
        )
        self.service_healthy = Gauge(
            "meshnode_service_healthy",
            "1 while a service of this host answers as it should, else 0",
            ["service"],
            registry=registry,
        )
        self.routing_decisions = Counter(
            "meshnode_routing_decisions_total",
            "Peers picked, by the tier that decided",
            ["tier"],
            registry=registry,
        )
        self.requests = Counter(
            "meshnode_requests_total",
            "Requests of clients that the gateway took, by how they ended",
            ["outcome"],
            registry=registry,
        )
        self.tunnels = Counter(
            "meshnode_tunnels_total",
            "Tunnels ended",
            ["role", "outcome"],  # role: entry, exit
            registry=registry,
        )
        self.tunnel_bytes = Counter(
            "meshnode_tunnel_bytes_total",
            "Bytes carried by tunnels",
            ["direction"],  # to_service, to_client
            registry=registry,
        )
        self.tunnel_open_seconds = Histogram(
            "meshnode_tunnel_open_seconds",
            "Until a new tunnel is accepted: in TCP mode from accepting its client, failed peers"
            " included; else from its opening, and requests over tunnels that were kept count none",
            buckets=_OPEN_BUCKETS,
            registry=registry,
        )
        self.request_ttft_seconds = Histogram(
            "meshnode_request_ttft_seconds",
            "From accepting a client to the first byte of its answer",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.retries = Counter(
            "meshnode_retries_total",
            "Peers given up before the first byte, by reason",
            ["reason"],
            registry=registry,
        )
        self.ejections = Counter(
            "meshnode_ejections_total",
            "Peers taken out of the candidates, by reason",
            ["reason"],
            registry=registry,
        )
        self.queue_length = Gauge(
            "meshnode_queue_length",
            "Requests that wait because every peer that could serve them is full",
            registry=registry,
        )
        self.queue_wait_seconds = Histogram(
            "meshnode_queue_wait_seconds",
            "How long requests waited for a peer that was not full, however it ended",
            ["outcome"],  # served, timeout, unserved (nobody could serve any more), gone
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self.queue_refused = Counter(
            "meshnode_queue_refused_total",
            "Requests turned away at once because too many waited already",
            registry=registry,
        )
        self.loss_reports = Counter(
            "meshnode_loss_reports_total",
            "Reports that a peer was lost: sent, ignored, and what the own look at it said",
            ["outcome"],  # sent, ignored, confirmed, wrong
            registry=registry,
        )
        self.affinity_batches = Counter(
            "meshnode_affinity_batches_total",
            "Batches of warm prompts sent to other entry nodes, and accepted from them",
            ["direction"],  # sent, received
            registry=registry,
        )
        self.affinity_batches_rejected = Counter(
            "meshnode_affinity_batches_rejected_total",
            "Batches of warm prompts not taken, by the error code of protocols/affinity",
            ["reason"],  # besides those: rate (of one origin), budget (of all together)
            registry=registry,
        )
        self.affinity_blocks = Counter(
            "meshnode_affinity_blocks_total",
            "Blocks of warm prompts: told, not told for want of room or time, and those heard",
            ["outcome"],  # sent, dropped; taken, not_offered (wrong or too late), crowded
            registry=registry,
        )
        self.affinity_blocks_known = Gauge(
            "meshnode_affinity_blocks_known",
            "Blocks of prompts of which this node knows who served them last",
            registry=registry,
        )
        self.affinity_pressure = Gauge(
            "meshnode_affinity_pressure",
            "Requests of the last minute that load drove off their warm cache, by model",
            ["model"],  # of the models here that have any, the busiest 50
            registry=registry,
        )
        self.gpu_read_errors = Counter(
            "meshnode_gpu_read_errors_total",
            "Failed readings of GPU memory",
            ["code"],
            registry=registry,
        )
        self.loop_lag_seconds = Histogram(
            "meshnode_loop_lag_seconds",
            "How late a timer of the event loop fires",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )
        self.protocol_faults = Counter(
            "meshnode_protocol_faults_total",
            "Frames and streams from peers dropped for breaking a protocol, and bugs in serving",
            ["protocol", "code"],  # control_api: request_failed (answered 500), connection_failed
            registry=registry,
        )
        self.memberships = Counter(
            "meshnode_memberships_total",
            "Connections that were asked to prove membership",
            ["outcome"],
            registry=registry,
        )
        self.relay_reservations = Gauge(
            "meshnode_relay_reservations",
            "Members that are reached through this node",
            registry=registry,
        )
        self.relay_circuits = Gauge(
            "meshnode_relay_circuits",
            "Connections of others that this node carries now",
            registry=registry,
        )
        self.relay_refusals = Counter(
            "meshnode_relay_refusals_total",
            "Reservations and circuits refused, by the status of circuit relay v2",
            ["status"],
            registry=registry,
        )
        self.relay_bytes = Counter(
            "meshnode_relay_bytes_total",
            "Bytes carried for others, each counted once",
            registry=registry,
        )
        self.build_info = Gauge(
            "meshnode_build_info", "Always 1", ["version", "python"], registry=registry
        )
