//! All that strangers talk to: the gRPC service.

pub mod convert;
pub mod layers;
pub mod message;
