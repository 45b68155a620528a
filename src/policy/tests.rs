//! Tests of loading as a whole: files in, faults or policies out.

mod bad_values;
mod extends;
mod golden;
mod hostile;
mod shipped;
mod whole;

use std::{fs, path::Path};

use super::compile::{Loaded, load};
use crate::jail::plan::HostUser;

/// Accounts of a host that doesn't exist.
fn users(name: &str) -> Option<HostUser> {
    let (uid, gid) = match name {
        "nobody" => (65_534, 65_534),
        "alice" => (1000, 1000),
        "toor" => (0, 0),
        "wheel" => (1001, 0),
        _ => return None,
    };
    Some(HostUser { name: name.to_owned(), uid, gid })
}

/// Loads files, by name and content, from a directory of their own. Faults are
/// shown with the file's name alone.
fn load_files(files: &[(&str, &str)]) -> Result<Loaded, Vec<String>> {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    load(directory.path(), &users).map_err(|faults| shown(&faults, directory.path()))
}

fn shown(faults: &[super::fault::Fault], directory: &Path) -> Vec<String> {
    let root = format!("{}/", directory.display());
    faults.iter().map(|fault| fault.to_string().replace(&root, "")).collect()
}

/// The faults of one policy file, each without the file's name.
fn faults_of(content: &str) -> Vec<String> {
    let faults = load_files(&[("p.toml", content)]).err().unwrap_or_default();
    faults.iter().map(|fault| fault.strip_prefix("p.toml:").unwrap_or(fault).to_owned()).collect()
}

/// The one policy of a file that has no faults.
fn policy_of(content: &str) -> super::Policy {
    let loaded = load_files(&[("p.toml", content)]).unwrap();
    loaded.set.policies["p"].base.clone()
}
