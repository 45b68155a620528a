//! One record per execution: who asked for what, under which policy, and how it
//! ended. It goes to the log under the target `audit`.
//!
//! Strings that a caller chose are bounded, escaped and quoted: none of them can
//! pass for another field.

use std::{collections::BTreeMap, time::Duration};

use crate::observe::{AUDIT_TARGET, printable};

/// Bytes of each of a caller's strings that are kept.
const TEXT_MAX: usize = 512;

/// Bytes of all labels together that are kept.
const LABELS_MAX: usize = 4096;

/// What is remembered of one execution.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// The call's id.
    pub run_id: String,
    /// The caller's own name for it.
    pub request_id: String,
    /// Where it came from: an address, or a local user.
    pub peer: String,
    /// Whose policy applied.
    pub namespace: String,
    /// The service asked for.
    pub service: String,
    /// The method asked for.
    pub method: String,
    /// The caller's labels.
    pub labels: BTreeMap<String, String>,
    /// The policy's name.
    pub policy: String,
    /// The policy's digest.
    pub policy_digest: String,
    /// The executable's digest.
    pub artifact: String,
    /// How it was executed.
    pub mode: String,
    /// The run that is the service's process, where one was to answer.
    pub instance: String,
    /// Whether that was there before the call.
    pub warm: bool,
    /// How it ended.
    pub verdict: &'static str,
    /// The status code's name.
    pub code: &'static str,
    /// Why; empty for success.
    pub reason: &'static str,
    /// Of the first process.
    pub exit_code: i32,
    /// That ended the first process; 0 for none.
    pub signal: i32,
    /// The deadly call that was made.
    pub denied_syscall: String,
    /// Waiting for a permit.
    pub queue: Duration,
    /// From the permit to the program's first instruction.
    pub setup: Duration,
    /// From the start to the end.
    pub wall: Duration,
    /// CPU time of the whole tree.
    pub cpu: Duration,
    /// Peak memory in bytes.
    pub memory_peak: u64,
}

/// Writes the record.
pub fn record(record: &Record) {
    let text = |text: &str| printable(text, TEXT_MAX);
    let milliseconds = |duration: Duration| duration.as_secs_f64() * 1000.0;
    tracing::info!(
        target: AUDIT_TARGET,
        run_id = %record.run_id,
        request_id = ?text(&record.request_id),
        peer = %text(&record.peer),
        namespace = ?text(&record.namespace),
        service = ?text(&record.service),
        method = ?text(&record.method),
        labels = %labels(&record.labels),
        policy = %record.policy,
        policy_digest = %record.policy_digest,
        artifact = %record.artifact,
        mode = %record.mode,
        instance = %record.instance,
        warm = record.warm,
        verdict = record.verdict,
        code = record.code,
        reason = record.reason,
        exit_code = record.exit_code,
        signal = record.signal,
        denied_syscall = %record.denied_syscall,
        queue_ms = milliseconds(record.queue),
        setup_ms = milliseconds(record.setup),
        wall_ms = milliseconds(record.wall),
        cpu_ms = milliseconds(record.cpu),
        memory_peak = record.memory_peak,
        "execution"
    );
}

/// Quoted, so that a value can't pass for another label.
fn labels(labels: &BTreeMap<String, String>) -> String {
    let all: Vec<String> = labels.iter().map(|(key, value)| format!("{key:?}={value:?}")).collect();
    printable(&all.join(","), LABELS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_quoted_escaped_and_bounded() {
        let map = BTreeMap::from([
            ("a".to_owned(), "x\",\"b\"=\"y".to_owned()),
            ("n".to_owned(), "line\nbreak".to_owned()),
        ]);
        assert_eq!(labels(&map), r#""a"="x\",\"b\"=\"y","n"="line\nbreak""#);
        let long = BTreeMap::from([("k".to_owned(), "v".repeat(9999))]);
        assert!(labels(&long).len() <= LABELS_MAX + '…'.len_utf8());
    }
}
