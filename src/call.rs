//! What a caller asks for, checked for form: every limit is sensible, every
//! name well formed, every list bounded. Whether it is allowed is decided later.

use std::{collections::BTreeMap, os::fd::OwnedFd, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{
    jail::plan::Mode,
    names::{Digest, MethodName, Namespace, ServiceName},
    policy::OutputFormat,
    units::MilliCpus,
};

/// Most bytes of argv and environment that a request may bring.
pub const ARGS_AND_ENV_MAX: usize = 128 << 10;

/// Most bytes of `GRPC_INPUT_DATA`.
pub const INPUT_DATA_MAX: usize = 96 << 10;

/// Least memory limit of a run, in bytes: below it nothing starts.
pub const MEMORY_MIN: u64 = 4 << 20;

/// One call.
#[derive(Clone, Debug)]
pub struct Call {
    /// Whose policy applies.
    pub namespace: Namespace,
    /// Which service.
    pub service: ServiceName,
    /// Which of its methods.
    pub method: MethodName,
    /// What to run.
    pub source: Source,
    /// What holds the bytes that it brings, where they were put there as they came.
    pub sealed: Option<Sealed>,
    /// The digest that the executable must have.
    pub digest: Option<Digest>,
    /// Its input; `None` for none.
    pub input: Option<Input>,
    /// The mode asked for.
    pub mode: Option<Mode>,
    /// The limits asked for.
    pub limits: AskedLimits,
    /// Appended to argv; no NUL in any.
    pub args: Vec<String>,
    /// Environment asked for; names are not empty, have no `=` and nothing has a NUL.
    pub env: BTreeMap<String, String>,
    /// How stdout becomes output.
    pub output: Option<OutputFormat>,
    /// The caller's own name for the call.
    pub request_id: String,
    /// For the audit record.
    pub labels: BTreeMap<String, String>,
    /// Metadata for a gRPC service: what stands behind `metadata.` in `execution_context`.
    pub metadata: BTreeMap<String, String>,
    /// Keys of `execution_context` that mean nothing here.
    pub ignored_context: Vec<String>,
}

/// Where the executable comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The registered one.
    Registered,
    /// These bytes.
    Inline(Bytes),
    /// One that the dispatcher holds already.
    Held(Digest),
    /// To be fetched.
    Uri(String),
}

/// A sealed memfd, and the digest of what is in it.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// Made of the very bytes that were put into it.
    pub digest: Digest,
    /// Read-only.
    pub memory: Arc<OwnedFd>,
}

/// The call's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// What it says its type is, as in an Any; no NUL.
    pub type_url: String,
    /// The serialized message; not a slice of the request, which it would keep
    /// in memory.
    pub value: Bytes,
}

/// Limits that a call asks for, tighter than its policy's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AskedLimits {
    /// Wall clock; more than zero.
    pub timeout: Option<Duration>,
    /// Bytes; at least [`MEMORY_MIN`].
    pub memory: Option<u64>,
    /// Share of processor time.
    pub cpus: Option<MilliCpus>,
}

/// What is wrong with a request's form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    /// A required field is empty.
    #[error("{field} is required")]
    Missing {
        /// As the wire names it.
        field: &'static str,
    },
    /// A field holds nonsense.
    #[error("{field} {what}")]
    Bad {
        /// As the wire names it, below its message.
        field: &'static str,
        /// Completes "FIELD ...".
        what: String,
    },
}

impl FormError {
    /// A field that holds nonsense; `what` completes the sentence that its name begins.
    pub fn bad(field: &'static str, what: impl Into<String>) -> Self {
        Self::Bad { field, what: what.into() }
    }
}
