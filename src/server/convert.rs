//! The wire ↔ the domain. What a request says is checked for form in
//! [`request`]; how a call went becomes a code, a verdict and a reason in
//! [`status`], the one place for that; [`reply`] puts it into messages.

pub mod reply;
pub mod request;
mod service;
pub mod status;
#[cfg(test)]
mod tests;

pub use reply::response;
pub use request::call;
pub use status::{Summary, code_of, summarize};
