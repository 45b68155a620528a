//! The launcher's world: how a run is isolated, started, watched and ended.
//!
//! Knows neither tokio nor TOML nor gRPC nor Docker. Where to read:
//!
//! | file | what |
//! | --- | --- |
//! | `plan` | what a policy comes to, as the monitor hands it over |
//! | `message` | what server and monitor say to the launcher, and its answers |
//! | `launcher` | the process: one loop over everything |
//! | `check`, `decide`, `blueprint`, `root`, `limits` | a launch checked, a jail decided |
//! | `init`, `mounts`, `program` | what is done, step by step, after the clone |
//! | `run` | one jail under supervision, from being built to being gone |
//! | `cgroup`, `identity`, `namespaces`, `network`, `sockets`, `landlock`, `seccomp` | the mechanisms |

pub mod blueprint;
pub mod cgroup;
pub mod check;
pub mod decide;
pub mod empty_root;
pub mod facts;
pub mod identity;
pub mod init;
pub mod landlock;
pub mod launcher;
pub mod limits;
pub mod message;
pub mod mounts;
pub mod namespaces;
pub mod network;
pub mod places;
pub mod plan;
pub mod program;
pub mod root;
pub mod run;
pub mod seccomp;
pub mod service;
pub mod sockets;
pub mod step;
