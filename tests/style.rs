//! compile check
mod common;
