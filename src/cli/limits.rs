//! The limits that `run` and `call` take as flags.

use std::time::Duration;

use clap::Args;

use crate::{
    jail::plan::Mode,
    units::{self, MilliCpus},
    wire::{ExecutionMode, ExecutionOptions},
};

/// `--timeout`, `--memory`, `--cpus`, `--mode`, `--env`: tighter than the policy's only.
#[derive(Clone, Debug, Default, Args)]
pub struct LimitArgs {
    /// Wall clock of the run, such as 1500ms, 30s or 2m
    #[arg(long, value_name = "D", value_parser = units::parse_duration)]
    timeout: Option<Duration>,
    /// Memory of the run, such as 64MiB
    #[arg(long, value_name = "N", value_parser = units::parse_size)]
    memory: Option<u64>,
    /// Share of processor time, such as 0.5
    #[arg(long, value_name = "X", value_parser = units::parse_cpus)]
    cpus: Option<MilliCpus>,
    /// jail, container or direct
    #[arg(long, value_name = "M", value_parser = parse_mode)]
    mode: Option<Mode>,
    /// An environment variable, where the policy allows it; may be repeated
    #[arg(long, value_name = "K=V", value_parser = parse_pair)]
    env: Vec<(String, String)>,
}

impl LimitArgs {
    /// As a request says it.
    #[must_use]
    pub fn options(&self, args: Vec<String>) -> ExecutionOptions {
        ExecutionOptions {
            mode: self.mode.map_or(ExecutionMode::Unspecified, wire_mode).into(),
            timeout: self.timeout.and_then(|timeout| timeout.try_into().ok()),
            memory_bytes: self.memory.unwrap_or(0),
            cpus: self.cpus.map_or(0.0, MilliCpus::as_f64),
            args,
            env: self.env.iter().cloned().collect(),
            ..Default::default()
        }
    }

    /// `--timeout`, if given.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout
    }
}

fn wire_mode(mode: Mode) -> ExecutionMode {
    match mode {
        Mode::Direct => ExecutionMode::Direct,
        Mode::Container => ExecutionMode::Container,
        Mode::Jail => ExecutionMode::Jail,
    }
}

fn parse_mode(text: &str) -> Result<Mode, String> {
    text.parse().map_err(|()| "write jail, container or direct".into())
}

/// `NAME=VALUE`; the value may be empty, and have more of these signs.
pub(super) fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_needs_a_name_and_an_equals_sign() {
        assert_eq!(parse_pair("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(parse_pair("A="), Ok(("A".into(), String::new())));
        assert!(parse_pair("A").is_err());
        assert!(parse_pair("=b").is_err());
    }
}
