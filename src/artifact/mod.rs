//! Executables: which bytes a call runs, and whether they can run here.

pub mod elf;
pub mod filling;
mod loader;
pub mod store;

pub use loader::check as check_root;

use std::{os::fd::OwnedFd, sync::Arc};

use bytes::Bytes;

use crate::{
    names::Digest,
    units::{Limit, Size},
};
use elf::{ElfError, Executable};

/// Content larger than this is hashed and copied on a thread that may block.
const BLOCKING_SIZE: usize = 256 << 10;

/// An executable, ready to run: sealed, inspected, shared by its runs.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// Of its content.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// What it needs to run.
    pub kind: Executable,
    /// A sealed memfd, read-only.
    pub memory: Arc<OwnedFd>,
    /// Whether the store keeps it, so that its memory is counted there.
    pub stored: bool,
}

/// Why there is no executable to run.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ArtifactError {
    /// No bytes at all.
    #[error("service binary is empty")]
    Empty,
    /// No executable for this machine.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// It needs a file that its root doesn't have.
    #[error("{0}")]
    LoaderMissing(String),
    /// A `#!` program that can't be run here, though its interpreter may be listed.
    #[error("{0}")]
    ScriptUnrunnable(String),
    /// A `#!` program whose interpreter isn't listed.
    #[error(
        "the script's interpreter {interpreter:?} is not allowed; list it in the policy's [artifacts] interpreters"
    )]
    ScriptNotAllowed {
        /// As its `#!` line says.
        interpreter: String,
    },
    /// The bytes are not those that were announced.
    #[error("the artifact's digest is {found}, not {expected} as asked for")]
    DigestMismatch {
        /// What the request said.
        expected: Digest,
        /// What the bytes have.
        found: Digest,
    },
    /// The policy lists digests, and this isn't one.
    #[error("the artifact {found} is not one that the policy's [artifacts] digests lists")]
    DigestNotAllowed {
        /// What the bytes have.
        found: Digest,
    },
    /// Over the policy's `artifact_size`.
    #[error("the artifact has {size} bytes; the policy's artifact_size allows {}", Size(*limit))]
    TooLarge {
        /// In bytes.
        size: u64,
        /// In bytes.
        limit: u64,
    },
    /// Nothing with this digest is held for the namespace.
    #[error("no artifact {0} is held here; send its bytes as service_binary")]
    Missing(Digest),
    /// Something in this process failed.
    #[error("{what}: {error}")]
    Internal {
        /// What was being done.
        what: &'static str,
        /// The error's text.
        error: String,
    },
}

/// Refuses what is larger than the policy's limit.
///
/// # Errors
/// [`ArtifactError::TooLarge`]
pub fn check_size(size: u64, limit: Limit<u64>) -> Result<(), ArtifactError> {
    match limit {
        Limit::At(limit) if size > limit => Err(ArtifactError::TooLarge { size, limit }),
        _ => Ok(()),
    }
}

/// Refuses an artifact that isn't the one asked for, or isn't listed.
///
/// # Errors
/// [`ArtifactError::DigestMismatch`], [`ArtifactError::DigestNotAllowed`]
pub fn check_digest(
    found: Digest,
    expected: Option<Digest>,
    listed: &[Digest],
) -> Result<(), ArtifactError> {
    if let Some(expected) = expected.filter(|expected| *expected != found) {
        return Err(ArtifactError::DigestMismatch { expected, found });
    }
    if !listed.is_empty() && !listed.contains(&found) {
        return Err(ArtifactError::DigestNotAllowed { found });
    }
    Ok(())
}

/// SHA-256 of some bytes.
///
/// # Errors
/// [`ArtifactError::Internal`] when the runtime is going down.
pub async fn digest_of(bytes: &Bytes) -> Result<Digest, ArtifactError> {
    if bytes.len() <= BLOCKING_SIZE {
        return Ok(Digest::of(bytes));
    }
    let bytes = bytes.clone();
    tokio::task::spawn_blocking(move || Digest::of(&bytes))
        .await
        .map_err(|error| internal("hashing the artifact", &error))
}

fn internal(what: &'static str, error: &dyn std::error::Error) -> ArtifactError {
    ArtifactError::Internal { what, error: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_and_digest_rules() {
        assert!(check_size(5, Limit::At(5)).is_ok());
        assert!(matches!(
            check_size(6, Limit::At(5)),
            Err(ArtifactError::TooLarge { size: 6, limit: 5 })
        ));
        assert!(check_size(6, Limit::Unlimited).is_ok());

        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        assert!(check_digest(one, None, &[]).is_ok());
        assert!(check_digest(one, Some(one), &[one]).is_ok());
        assert!(matches!(
            check_digest(one, Some(two), &[]),
            Err(ArtifactError::DigestMismatch { .. })
        ));
        assert!(matches!(
            check_digest(one, None, &[two]),
            Err(ArtifactError::DigestNotAllowed { .. })
        ));
    }

    #[tokio::test]
    async fn large_content_is_hashed_the_same() {
        let bytes = Bytes::from(vec![7; BLOCKING_SIZE + 1]);
        assert_eq!(digest_of(&bytes).await.unwrap(), Digest::of(&bytes));
    }
}
