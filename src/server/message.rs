//! What the monitor says to the server, and what it answers.
//!
//! The server starts with one descriptor, 3: its end of a SOCK_SEQPACKET pair
//! with the monitor. One postcard message per packet, descriptors as SCM_RIGHTS.

use serde::{Deserialize, Serialize};

use crate::config::{Config, ListenAddress};

/// Monitor → server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromMonitor {
    /// First message, once. Descriptors: one listening socket per entry of
    /// `listeners`, then (where `health` is set) the health listener.
    Configure {
        /// The checked configuration.
        config: Box<Config>,
        /// What each listening socket is, with the real port.
        listeners: Vec<ListenAddress>,
        /// Whether one more socket serves health and metrics.
        health: bool,
    },
    /// One descriptor: a sealed memfd holding a postcard `PolicySet`.
    Policies,
    /// One descriptor: this server's end of a fresh socketpair with the launcher.
    Launcher,
    /// One descriptor: this server's end of a fresh socketpair with `dispatch-docker`.
    Containers,
    /// SIGTERM or SIGINT came: stop taking calls, finish what runs, exit 0.
    Drain,
}

/// Server → monitor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromServer {
    /// Every listener is being served and the launcher is ready.
    Ready,
    /// For a while there has been no launcher to talk to. If one is alive, the
    /// two need a fresh socketpair; again and again until there is one.
    LauncherLost,
}
