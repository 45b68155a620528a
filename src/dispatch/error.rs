//! Why a call came to nothing.

use crate::{
    admission::AdmissionError,
    artifact::ArtifactError,
    call::{Call, FormError},
    execute::ExecuteError,
    instances::NotServed,
    jail::plan::Mode,
    names::Digest,
};

/// Why no program ran, or why nothing is known of how it went.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The request is malformed.
    #[error(transparent)]
    Form(#[from] FormError),
    /// Neither a policy of its own nor a default one.
    #[error("no policy for namespace {0}")]
    NoPolicy(String),
    /// `[services] allow` doesn't list it.
    #[error("the policy {policy} does not allow {service}/{method}")]
    ServiceNotAllowed {
        /// The policy's name.
        policy: String,
        /// As asked for.
        service: String,
        /// As asked for.
        method: String,
    },
    /// Neither the policy's mode nor in `allow_modes`.
    #[error("the policy {policy} does not allow mode {mode}")]
    ModeNotAllowed {
        /// The policy's name.
        policy: String,
        /// As asked for.
        mode: Mode,
    },
    /// `[artifacts] inline` is off, or `uris` has no matching prefix.
    #[error("the policy {policy} does not allow {what}")]
    SourceNotAllowed {
        /// The policy's name.
        policy: String,
        /// In words.
        what: String,
    },
    /// `[artifacts] digests` doesn't list it.
    #[error("the policy {policy} does not list the artifact {digest}")]
    DigestNotAllowed {
        /// The policy's name.
        policy: String,
        /// As asked for.
        digest: Digest,
    },
    /// `[environment] allow` doesn't list it.
    #[error("the policy {policy} does not allow setting the environment variable {name:?}")]
    EnvNotAllowed {
        /// The policy's name.
        policy: String,
        /// As asked for.
        name: String,
    },
    /// More than the policy gives.
    #[error("{limit} of {requested} asked for; the policy {policy} allows {allowed}")]
    OverPolicy {
        /// The policy's name.
        policy: String,
        /// The limit's key in `[limits]`.
        limit: &'static str,
        /// As it would be written.
        requested: String,
        /// As it would be written.
        allowed: String,
    },
    /// Nothing to run was sent, and nothing is registered.
    #[error("service not found and no service_def provided: {0}")]
    ServiceNotFound(String),
    /// There is no executable to run.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// Asked for what a later version brings.
    #[error("{0} is not implemented yet")]
    Unimplemented(String),
    /// It may not run now.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// It could not be started.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    /// No service takes it.
    #[error(transparent)]
    Service(NotServed),
    /// This process failed.
    #[error("the dispatcher failed: {0}")]
    Internal(String),
}

impl CallError {
    pub(super) fn service_not_found(call: &Call) -> Self {
        // An empty service namespace means the call's own.
        let namespace = &call.namespace;
        Self::ServiceNotFound(format!("{namespace}/{namespace}/{}", call.service))
    }
}

impl From<NotServed> for CallError {
    fn from(error: NotServed) -> Self {
        match error {
            NotServed::Execute(error) => error.into(),
            NotServed::Admission(error) => error.into(),
            error @ (NotServed::CrashLoop { .. }
            | NotServed::NoRoom
            | NotServed::TooMany { .. }) => Self::Service(error),
        }
    }
}
