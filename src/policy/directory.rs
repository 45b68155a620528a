//! Reading the policy directory: plain files of bounded size and number, and
//! nothing else that may lie in wait there.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use super::{
    fault::{Fault, Place},
    read::Source,
};
use crate::{names::Namespace, sys};

/// Largest policy file or seccomp profile, in bytes.
pub const FILE_MAX: u64 = 1 << 20;

/// Most policy files of one directory.
pub const FILES_MAX: usize = 4096;

/// Most entries of one directory, policy files or not.
const ENTRIES_MAX: usize = 65_536;

/// What a file of a policy is called: `DIR/NAME.toml`.
#[must_use]
pub fn policy_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.toml"))
}

/// What a file of a seccomp profile is called: `DIR/seccomp/NAME.json`.
#[must_use]
pub fn profile_path(directory: &Path, name: &str) -> PathBuf {
    directory.join("seccomp").join(format!("{name}.json"))
}

/// The name of the policy in a file.
///
/// # Errors
/// Where the file isn't called `NAME.toml`, or NAME can't be a namespace.
pub fn policy_name(path: &Path) -> Result<Namespace, Fault> {
    let file_name = path.file_name().unwrap_or_default();
    let Some(stem) = file_name.to_str().and_then(|name| name.strip_suffix(".toml")) else {
        return Err(Fault::of_file(
            path,
            "the file's name doesn't end in .toml, or isn't UTF-8",
            "call it NAMESPACE.toml",
        ));
    };
    stem.parse().map_err(|error| {
        let message = format!("{stem:?} can't be a namespace: it {error}");
        Fault::of_file(path, message, "call the file NAMESPACE.toml")
    })
}

/// Every policy file of a directory, by name. `None` for one that can't be read;
/// what is wrong goes to `faults`.
pub fn read_policies(
    directory: &Path,
    faults: &mut Vec<Fault>,
) -> BTreeMap<String, Option<Source>> {
    let mut sources = BTreeMap::new();
    let paths = match list(directory) {
        Ok(paths) => paths,
        Err(fault) => {
            faults.push(fault);
            return sources;
        }
    };
    for path in paths {
        match policy_name(&path) {
            Ok(name) => {
                let source = read_text(&path).map(|text| Source::new(&path, text));
                sources.insert(name.into(), source.map_err(|fault| faults.push(fault)).ok());
            }
            Err(fault) => faults.push(fault),
        }
    }
    sources
}

/// The text of one file.
///
/// # Errors
/// Where it isn't there, isn't a plain file, is too large or isn't UTF-8.
pub fn read_text(path: &Path) -> Result<String, Fault> {
    let fault = |error: io::Error| {
        Fault::of_file(
            path,
            format!("can't be read: {error}"),
            "check that it is there and readable",
        )
    };
    check_plain(path, &fs::symlink_metadata(path).map_err(fault)?)?;
    let file = sys::open_no_follow(path).map_err(fault)?;
    // It may have been replaced meanwhile.
    check_plain(path, &file.metadata().map_err(fault)?)?;
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(fault)?;
    if bytes.len() as u64 > FILE_MAX {
        let message = format!("is larger than {FILE_MAX} bytes");
        return Err(Fault::of_file(path, message, "split it by extends"));
    }
    String::from_utf8(bytes).map_err(|error| not_utf8(path, &error))
}

fn check_plain(path: &Path, metadata: &fs::Metadata) -> Result<(), Fault> {
    let kind = metadata.file_type();
    let what = match kind {
        _ if kind.is_file() => return Ok(()),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_symlink() => "a symbolic link",
        _ => "a device, pipe or socket",
    };
    Err(Fault::of_file(path, format!("is {what}"), "put a plain file there"))
}

fn not_utf8(path: &Path, error: &std::string::FromUtf8Error) -> Fault {
    let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
    // The place of the first bad byte: the end of the text before it.
    let before = String::from_utf8_lossy(valid);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |last| last.chars().count()) + 1;
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let place = Place::File { file: path.into(), line: number(line), column: number(column) };
    Fault::new(&place, "is not UTF-8 text", "save the file as UTF-8")
}

/// The entries that are meant as policies, sorted.
fn list(directory: &Path) -> Result<Vec<PathBuf>, Fault> {
    let fault = |error: io::Error| {
        let help = "make the directory, or name another one with --policies";
        Fault::of_file(directory, format!("can't be read as a directory: {error}"), help)
    };
    let mut paths = Vec::new();
    for (index, entry) in fs::read_dir(directory).map_err(fault)?.enumerate() {
        let path = entry.map_err(fault)?.path();
        let extension = path.extension().map(|extension| extension.to_ascii_lowercase());
        // `.toml` alone has no extension for Path, and is meant as one all the same.
        let bare = path.file_name().is_some_and(|name| name == ".toml");
        if bare || extension.is_some_and(|extension| extension == "toml") {
            paths.push(path);
        }
        if paths.len() > FILES_MAX || index >= ENTRIES_MAX {
            let message = format!("has more than {FILES_MAX} policies or {ENTRIES_MAX} files");
            return Err(Fault::of_file(directory, message, "let namespaces share default.toml"));
        }
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use std::os::unix::{ffi::OsStrExt as _, fs::symlink};

    use super::*;

    fn faults_of(prepare: impl FnOnce(&Path)) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        prepare(directory.path());
        let mut faults = Vec::new();
        read_policies(directory.path(), &mut faults);
        let root = format!("{}/", directory.path().display());
        faults.iter().map(|fault| fault.to_string().replace(&root, "")).collect()
    }

    #[test]
    fn only_plain_utf8_files_with_a_namespace_for_a_name_are_read() {
        let faults = faults_of(|directory| {
            fs::create_dir(directory.join("a.toml")).unwrap();
            symlink("/etc/passwd", directory.join("b.toml")).unwrap();
            symlink("/nowhere", directory.join("c.toml")).unwrap();
            fs::write(directory.join("d.toml"), b"mode = \"jail\"\nx = \"\xff\"").unwrap();
            fs::write(directory.join("-e.toml"), "").unwrap();
            fs::write(directory.join("F.TOML"), "").unwrap();
            fs::write(directory.join(".toml"), "").unwrap();
            fs::write(directory.join(std::ffi::OsStr::from_bytes(b"g\xff.toml")), "").unwrap();
            nix::unistd::mkfifo(&directory.join("h.toml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
            fs::create_dir(directory.join("seccomp")).unwrap();
            fs::write(directory.join("README"), "not a policy").unwrap();
        });
        let begins = [
            "-e.toml:1:1: \"-e\" can't be a namespace: it has '-' at byte 0; ",
            ".toml:1:1: \"\" can't be a namespace: it is empty; ",
            "F.TOML:1:1: the file's name doesn't end in .toml",
            "a.toml:1:1: is a directory; ",
            "b.toml:1:1: is a symbolic link; ",
            "c.toml:1:1: is a symbolic link; ",
            "d.toml:2:6: is not UTF-8 text; save the file as UTF-8",
            "g\u{fffd}.toml:1:1: the file's name doesn't end in .toml, or isn't UTF-8",
            "h.toml:1:1: is a device, pipe or socket; ",
        ];
        assert_eq!(faults.len(), begins.len(), "{faults:#?}");
        for (fault, begin) in faults.iter().zip(begins) {
            assert!(fault.starts_with(begin), "{fault:?} {begin:?}");
        }
    }

    #[test]
    fn size_and_number_are_bounded() {
        let faults = faults_of(|directory| {
            fs::write(directory.join("a.toml"), vec![b'#'; FILE_MAX as usize]).unwrap();
            fs::write(directory.join("b.toml"), vec![b'#'; FILE_MAX as usize + 1]).unwrap();
        });
        assert_eq!(faults, ["b.toml:1:1: is larger than 1048576 bytes; split it by extends"]);
        let faults = faults_of(|directory| {
            for number in 0..=FILES_MAX {
                fs::write(directory.join(format!("{number}.toml")), "").unwrap();
            }
        });
        assert!(faults[0].contains("more than 4096 policies"), "{faults:?}");
        assert_eq!(faults.len(), 1);
    }

    #[test]
    fn a_missing_directory_is_a_fault() {
        let mut faults = Vec::new();
        read_policies(Path::new("/nowhere/at/all"), &mut faults);
        let begin = "/nowhere/at/all:1:1: can't be read as a directory: ";
        assert!(faults[0].to_string().starts_with(begin), "{faults:?}");
    }
}
