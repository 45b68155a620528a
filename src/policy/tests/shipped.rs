//! The policies that the project ships.

use std::path::Path;

use super::users;
use crate::{
    jail::plan::{Mode, Root},
    policy::{Protocol, compile::load},
    units::Limit,
};

#[test]
fn they_load_without_faults_or_warnings() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
    let loaded = load(&directory, &users).unwrap();
    assert_eq!(loaded.warnings, []);
    let names: Vec<&str> = loaded.set.policies.keys().map(String::as_str).collect();
    assert_eq!(names, ["batch", "default", "grpc", "python", "trusted"]);
    let policy = |name: &str| &loaded.set.policies[name].base;
    let empty = super::policy_of("");
    assert_eq!(policy("default").digest, empty.digest, "default.toml says what holds anyway");
    assert_eq!(policy("batch").limits.memory, Limit::At(4 << 30));
    assert_eq!(policy("batch").filesystem.root, Root::Empty);
    assert_eq!(policy("grpc").protocol, Protocol::Grpc);
    assert_eq!(policy("python").filesystem.root, Root::Host);
    assert_eq!(policy("python").environment["HOME"], "/tmp");
    assert_eq!(policy("trusted").mode, Mode::Direct);
}

#[test]
fn every_line_is_explained() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let mut explained = false;
        for line in std::fs::read_to_string(&path).unwrap().lines() {
            // A comment above holds for the lines up to the next empty one.
            explained = !line.is_empty() && (explained || line.contains('#'));
            let table = line.starts_with('[');
            assert!(line.is_empty() || table || explained, "{}: {line}", path.display());
        }
    }
}
