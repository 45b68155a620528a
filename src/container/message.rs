//! What the monitor says to `dispatch-docker`. With the server it speaks as the launcher
//! does: `jail::message`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Monitor → `dispatch-docker`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromMonitor {
    /// First message, once. No descriptors.
    Configure(ContainerConfig),
    /// One descriptor: a sealed memfd holding a postcard `TemplateSet`.
    Policies,
    /// One descriptor: our end of a fresh socketpair with the server. Replaces the earlier
    /// one; what ran for that one is ended.
    Server,
}

/// Its share of the server's own file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// `[docker] socket`
    pub socket: PathBuf,
    /// A directory of ours alone, which Docker sees by the same path: each container has
    /// one in it, shown to it read-only.
    pub directory: PathBuf,
}
