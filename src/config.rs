//! The server's own file, `dispatcher.toml`: as written → checked.
//!
//! [`load()`] lays flags over variables over the file over what is built in.

mod address;
mod load;
mod uids;
mod written;

use std::{path::PathBuf, time::Duration};

pub use address::AddressError;
pub use load::{
    ConfigOverrides, LoadedConfig, SYSTEM_FILE, Surroundings, check_file, exposed, find_file, load,
};

use serde::{Deserialize, Serialize};

/// The server's settings, complete and checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// `executor_id`; by default the host's name.
    pub id: String,
    /// Where to listen.
    pub listen: Vec<ListenAddress>,
    /// Health and metrics only, plaintext.
    pub health_listen: Option<ListenAddress>,
    /// Permission bits of unix sockets.
    pub socket_mode: u32,
    /// Group of unix sockets, by name; empty: as created.
    pub socket_group: String,
    /// How long running calls may take to finish on SIGTERM.
    pub drain_timeout: Duration,
    /// Runs at once, all namespaces together; 0: as memory allows.
    pub concurrency: u32,
    /// Bytes that the running calls' memory limits may add up to.
    pub memory: MemoryBudget,
    /// Request bytes held at once, over all connections.
    pub inflight_bytes: u64,
    /// Connections at once.
    pub max_connections: u32,
    /// Where runs' cgroups are made; empty: the delegated or own one.
    pub cgroup_parent: String,
    /// First and last host uid for jails.
    pub uid_range: (u32, u32),
    /// `[policies] dir`
    pub policies: PathBuf,
    /// `[policies] reload`
    pub reload: Reload,
    /// `[state] dir`
    pub state: PathBuf,
    /// `[artifacts] cache`, bytes of executables kept.
    pub artifact_cache: u64,
    /// `[docker] socket`
    pub docker_socket: PathBuf,
    /// `[docker] directory`
    pub docker_directory: PathBuf,
    /// Whether listening beyond loopback without TLS was allowed by `--insecure`.
    pub insecure: bool,
}

/// `HOST:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ListenAddress {
    /// Host (name or address) and port; port 0 picks one.
    Tcp {
        /// Without brackets.
        host: String,
        /// 0: any.
        port: u16,
    },
    /// A path in the file system.
    Unix(PathBuf),
}

/// How much memory running calls may be promised together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum MemoryBudget {
    /// Of what this host (or our cgroup) has.
    Percent(f64),
    /// So many bytes.
    Bytes(u64),
}

/// When policies are loaded again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reload {
    /// On SIGHUP.
    Signal,
    /// On SIGHUP, and when the directory changed and was then quiet for a second.
    Watch,
}

/// JSON Schema (draft 2020-12) of the file.
#[must_use]
pub fn schema() -> serde_json::Value {
    use crate::policy::schema::{DIALECT, object, properties};

    let mut schema = object(properties(&written::describe(), written::TABLES));
    schema["$schema"] = DIALECT.into();
    schema["title"] = "The dispatcher's own file".into();
    schema
}

#[cfg(test)]
mod tests;
