//! The launcher's world: how a run is isolated, started, watched and ended.
//!
//! Knows neither tokio nor TOML nor gRPC nor Docker. Start reading at
//! `launcher` (the process), then `launch` (one run, step by step).

pub mod message;
pub mod plan;
