//! What operators watch, as text for Prometheus.
//!
//! Counters and histograms are fed from the audit records; gauges are read from
//! their owners when asked for. No label holds a caller's words: a policy's name
//! is the operator's, the others are ours, so their number is bounded.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

use super::{connections::Connections, layers::gate::Gate};
use crate::{admission::bytes::ByteBudget, audit::Record, dispatch::Dispatcher};

/// What [`Metrics::render`] is, to HTTP.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The first bound of the histograms, in seconds, each next one twice as much:
/// from half a millisecond to half a minute.
const FIRST_BUCKET: f64 = 0.0005;
const BUCKETS: u16 = 17;

/// The metrics; clones are the same ones.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    calls: Family<CallLabels, Counter>,
    queue: Family<PolicyLabel, Histogram>,
    setup: Family<PolicyLabel, Histogram>,
    wall: Family<PolicyLabel, Histogram>,
    cpu: Family<PolicyLabel, Counter<f64>>,
}

/// Where gauges are read.
#[derive(Debug)]
pub struct Gauges {
    /// Runs, queues, executables.
    pub dispatcher: Arc<Dispatcher>,
    /// Request bytes held.
    pub bytes: ByteBudget,
    /// Those of the service's listeners.
    pub connections: Connections,
    /// Whether the service drains.
    pub gate: Gate,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    policy: String,
    mode: String,
    verdict: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabel {
    policy: String,
}

fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(FIRST_BUCKET, 2.0, BUCKETS))
}

impl Metrics {
    /// Nothing counted yet.
    #[must_use]
    pub fn new(gauges: Gauges) -> Self {
        let mut registry = Registry::with_prefix("dispatcher");
        let durations = || Family::new_with_constructor(histogram as fn() -> Histogram);
        let (queue, setup, wall) = (durations(), durations(), durations());
        let calls = Family::default();
        let cpu = Family::default();
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "What is running", version);
        registry.register("calls", "Serve calls that were answered", calls.clone());
        let mut seconds = |name, help, family: &Family<_, Histogram>| {
            registry.register_with_unit(name, help, Unit::Seconds, family.clone());
        };
        seconds("queue", "Time that calls waited for their turn", &queue);
        seconds("setup", "Time from a call's turn to its program's first instruction", &setup);
        seconds("wall", "Time that programs ran", &wall);
        let help = "CPU time of programs and all they started";
        registry.register_with_unit("cpu", help, Unit::Seconds, cpu.clone());
        registry.register_collector(Box::new(gauges));
        Self { registry: Arc::new(registry), calls, queue, setup, wall, cpu }
    }

    /// Counts a call that was answered.
    pub fn count(&self, record: &Record) {
        let calls = CallLabels {
            policy: record.policy.clone(),
            mode: record.mode.clone(),
            verdict: record.verdict,
            reason: record.reason,
        };
        self.calls.get_or_create(&calls).inc();
        let policy = PolicyLabel { policy: record.policy.clone() };
        self.queue.get_or_create(&policy).observe(record.queue.as_secs_f64());
        // Nothing ran: zeroes would only hide how long those took that did.
        if record.verdict == "REFUSED" {
            return;
        }
        self.setup.get_or_create(&policy).observe(record.setup.as_secs_f64());
        self.wall.get_or_create(&policy).observe(record.wall.as_secs_f64());
        self.cpu.get_or_create(&policy).inc_by(record.cpu.as_secs_f64());
    }

    /// All of them, in the form of [`CONTENT_TYPE`].
    ///
    /// # Errors
    /// Those of a metric that can't be written; none of ours is known to.
    pub fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let load = self.dispatcher.load();
        let artifacts = self.dispatcher.artifacts_held();
        let connections = self.connections.counts();
        let instances = self.dispatcher.instances();
        let gauges: [(&str, &str, Option<Unit>, u64); 15] = [
            ("running", "Runs under way", None, load.running.into()),
            ("waiting", "Calls that wait for their turn", None, load.waiting as u64),
            ("memory_reserved", "Memory limits of what runs, added up", BYTES, load.memory),
            ("memory_budget", "What they may add up to", BYTES, load.budget),
            ("quarantined", "Ended runs that can't be removed yet", None, self.quarantined()),
            ("instances_busy", "Services with a call", None, instances.busy as u64),
            ("instances_idle", "Services without a call", None, instances.idle as u64),
            ("instances_starting", "Services not ready yet", None, instances.starting as u64),
            ("artifacts", "Executables held", None, artifacts.count as u64),
            ("artifacts_size", "Memory that they take", BYTES, artifacts.bytes),
            ("inflight", "Bytes of requests and replies held", BYTES, self.bytes.used()),
            ("inflight_max", "Beyond this no request is taken in", BYTES, self.bytes.limit()),
            ("connections", "Connections open", None, connections.open as u64),
            ("calls_inside", "Calls taken in and not yet answered", None, self.inside()),
            ("draining", "1 while no new calls are taken", None, self.gate.is_closed().into()),
        ];
        for (name, help, unit, value) in gauges {
            let gauge = ConstGauge::new(value);
            let metric =
                encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        let counters = [
            ("connections_stalled", "Ones closed for an answer not taken", connections.stalled),
            ("connections_displaced", "Quiet ones closed for others", connections.displaced),
            ("connections_refused", "Ones closed at once for want of room", connections.refused),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}

const BYTES: Option<Unit> = Some(Unit::Bytes);

impl Gauges {
    fn quarantined(&self) -> u64 {
        self.dispatcher.quarantined() as u64
    }

    fn inside(&self) -> u64 {
        self.gate.inside() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::{Admission, Capacity},
        execute::launcher::Launcher,
        policy::store::PolicyStore,
        testing,
    };
    use std::time::Duration;

    fn metrics() -> Metrics {
        let policies = Arc::new(PolicyStore::new(testing::policy_set([])));
        let admission = Admission::new(Capacity { runs: None, memory: 1 << 30 });
        let dispatcher = Dispatcher::new(policies, admission, Launcher::new(), 1 << 20);
        Metrics::new(Gauges {
            dispatcher: Arc::new(dispatcher),
            bytes: ByteBudget::new(1 << 20),
            connections: Connections::new(4),
            gate: Gate::default(),
        })
    }

    #[test]
    fn calls_are_counted_by_what_became_of_them() {
        let metrics = metrics();
        let ran = Record {
            policy: "demo".to_owned(),
            mode: "jail".to_owned(),
            verdict: "EXITED",
            wall: Duration::from_millis(3),
            cpu: Duration::from_millis(500),
            ..Record::default()
        };
        metrics.count(&ran);
        metrics.count(&ran);
        metrics.count(&Record { verdict: "REFUSED", reason: "queue_full", ..ran });
        let text = metrics.render().unwrap();
        for line in [
            r#"dispatcher_calls_total{policy="demo",mode="jail",verdict="EXITED",reason=""} 2"#,
            r#"dispatcher_calls_total{policy="demo",mode="jail",verdict="REFUSED",reason="queue_full"} 1"#,
            r#"dispatcher_queue_seconds_count{policy="demo"} 3"#,
            r#"dispatcher_wall_seconds_count{policy="demo"} 2"#,
            r#"dispatcher_wall_seconds_bucket{le="0.004",policy="demo"} 2"#,
            r#"dispatcher_cpu_seconds_total{policy="demo"} 1.0"#,
            "dispatcher_memory_budget_bytes 1073741824",
            "dispatcher_draining 0",
            "dispatcher_connections_refused_total 0",
            "# EOF",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} in:\n{text}");
        }
    }
}
