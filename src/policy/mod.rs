//! Policies: whose rules hold for a namespace, and what they are.
//!
//! file (as written) → resolve (extends, defaults, provenance) → [`Policy`].
//! Nothing here asks the system for more than the files of the policy directory
//! and, for direct mode's user, the account database ([`compile::host_user`]).

pub mod check;
pub mod choose;
pub mod compile;
pub mod directory;
pub mod explain;
pub mod fault;
pub mod glob;
pub mod kinds;
pub mod outline;
pub mod profile;
pub mod quantities;
pub mod read;
pub mod resolve;
pub mod schema;
pub mod store;
pub mod tables;
pub mod values;
pub mod written;

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    jail::plan::{
        Container, Control, Filesystem, Limits, Mode, Network, SyscallPolicy, TemplateId,
    },
    names::Digest,
    units::{Limit, Rate},
};

/// One policy, resolved and checked. Immutable: a call keeps the one it began with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// Its name and which `[service."…"]` override of it this is.
    pub id: TemplateId,
    /// Digest of everything below; `policy_digest` in reports.
    pub digest: Digest,
    /// The mode used unless a call asks for another.
    pub mode: Mode,
    /// What else a call may ask for.
    pub allow_modes: Vec<Mode>,
    /// Controls whose absence doesn't refuse the call.
    pub best_effort: Vec<Control>,
    /// How the program takes its call.
    pub protocol: Protocol,
    /// How argv is made.
    pub argv: Argv,
    /// How stdout becomes output, unless a call asks otherwise.
    pub output: OutputFormat,
    /// `[limits]`
    pub limits: Limits,
    /// `[filesystem]`
    pub filesystem: Filesystem,
    /// `[network]`
    pub network: Network,
    /// `[seccomp]`, with `allow` and `deny` applied.
    pub syscalls: SyscallPolicy,
    /// `[capabilities] keep`, by number.
    pub keep_capabilities: Vec<u8>,
    /// `[identity] user`; empty: nobody.
    pub user: String,
    /// `[environment] set`
    pub environment: BTreeMap<String, String>,
    /// `[environment] allow`
    pub environment_allow: Vec<String>,
    /// `[services] allow`: `SERVICE/METHOD` globs.
    pub services: Vec<String>,
    /// `[artifacts]`
    pub artifacts: Artifacts,
    /// `[admission]`
    pub admission: Admission,
    /// `[container]`
    pub container: Container,
    /// `[instances]`
    pub instances: Instances,
}

/// The user of direct mode where a policy names none.
const NOBODY: &str = "nobody";

impl Policy {
    /// The name of the host user that direct mode runs programs as.
    #[must_use]
    pub fn direct_user(&self) -> &str {
        named_or_nobody(&self.user)
    }
}

fn named_or_nobody(user: &str) -> &str {
    if user.is_empty() { NOBODY } else { user }
}

/// How a program takes its call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Started once per call, input on stdin.
    Exec,
    /// A gRPC server (a later issue).
    Grpc,
}

/// How argv is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Argv {
    /// `service NAMESPACE SERVICE METHOD [args…]`
    Collector,
    /// `service [args…]`
    Plain,
}

/// How stdout becomes output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputFormat {
    /// An Any of `collector.Status`.
    Status,
    /// An Any of `google.protobuf.BytesValue`.
    Bytes,
    /// Stdout is itself a serialized Any.
    Any,
}

/// `[artifacts]`: which executables may run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifacts {
    /// Whether `service_binary` is accepted.
    pub inline: bool,
    /// Prefixes of `service_uri` that may be used (`sha256:` needs none).
    pub uris: Vec<String>,
    /// When not empty, only these.
    pub digests: Vec<Digest>,
    /// Interpreters for `#!` programs, absolute paths.
    pub interpreters: Vec<String>,
}

/// `[admission]`: how many calls at once, and how long others wait.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Admission {
    /// Runs at once.
    pub concurrency: Limit<u32>,
    /// Calls that may wait.
    pub queue: Limit<u32>,
    /// How long they may wait.
    pub queue_timeout: Limit<Duration>,
    /// Calls begun per second.
    pub rate: Limit<Rate>,
}

/// `[instances]`: the processes of a gRPC server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instances {
    /// Kept ready.
    pub min: u32,
    /// At most this many.
    pub max: u32,
    /// Calls at once in one instance.
    pub concurrency: u32,
    /// How long one may take to answer first.
    pub start_timeout: Limit<Duration>,
    /// How long an idle one is kept.
    pub idle_timeout: Limit<Duration>,
    /// Calls after which it is replaced.
    pub max_requests: Limit<u64>,
}

/// All policies of one load, with the rules of choosing among them.
///
/// Built by the compiler process, passed to the server in a sealed memfd.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicySet {
    /// Digest of the set; the same as its `TemplateSet`'s.
    pub digest: Digest,
    /// By name, that is by namespace; `default` for all that have none.
    pub policies: BTreeMap<String, PolicyFamily>,
}

/// A policy with its `[service."…"]` overrides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyFamily {
    /// The policy itself, variant 0.
    pub base: Policy,
    /// Its overrides: glob and the policy as overridden, variants 1….
    pub overrides: Vec<(String, Policy)>,
}

#[cfg(test)]
mod tests;
