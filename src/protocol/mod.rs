//! How a program takes its call and gives its answer.

pub mod exec;
mod json;
