//! Whether what an executable needs is in the root that it will see.

use std::{fs, io, path::Path};

use rustix::fs::{CWD, Mode as FileMode, OFlags, ResolveFlags};

use super::{ArtifactError, elf::Executable};
use crate::jail::plan::{Filesystem, Mode, Root};

/// Top directories of the host that `root = "host"` shows; `/lib*` by prefix.
const SHOWN: [&str; 4] = ["/usr", "/bin", "/sbin", "/opt"];

/// Checks that the loader or the interpreter will be found, and that a script's
/// interpreter is listed. What can't be known from here passes: execve(2) tells.
///
/// # Errors
/// [`ArtifactError::ScriptNotAllowed`], [`ArtifactError::ScriptUnrunnable`],
/// [`ArtifactError::LoaderMissing`]
pub fn check(
    executable: &Executable,
    mode: Mode,
    filesystem: &Filesystem,
    interpreters: &[String],
) -> Result<(), ArtifactError> {
    let (needed, what) = match executable {
        Executable::Static => return Ok(()),
        Executable::Dynamic { loader } => (loader, "loader"),
        Executable::Script { interpreter, .. } => {
            if !interpreters.contains(interpreter) {
                return Err(ArtifactError::ScriptNotAllowed { interpreter: interpreter.clone() });
            }
            if mode == Mode::Direct {
                let why = "a script needs a jail, where it can be shown to its interpreter; \
                           direct mode runs executables only";
                return Err(ArtifactError::ScriptUnrunnable(why.into()));
            }
            (interpreter, "interpreter")
        }
    };
    let present = match mode {
        // An image: only Docker knows what is in it.
        Mode::Container => true,
        Mode::Direct => on_host(needed),
        Mode::Jail => bound(needed, filesystem) || in_root(needed, &filesystem.root),
    };
    if present { Ok(()) } else { Err(missing(needed, what, mode, &filesystem.root)) }
}

fn missing(needed: &str, what: &str, mode: Mode, root: &Root) -> ArtifactError {
    let place = match (mode, root) {
        (Mode::Jail, Root::Empty) => "the policy's empty root".to_owned(),
        (Mode::Jail, Root::Directory(path)) => format!("the policy's root {}", path.display()),
        _ => "the host".to_owned(),
    };
    let (kind, mend) = if what == "loader" {
        let build = "link it statically (cc -static; cargo build --target x86_64-unknown-linux-musl; CGO_ENABLED=0 go build)";
        ("the executable is dynamically linked and its loader", build)
    } else {
        ("the script's interpreter", "send a static executable")
    };
    let key = match (mode, root) {
        (Mode::Jail, Root::Empty) => ", or set [filesystem] root = \"host\" in the policy",
        (Mode::Jail, Root::Directory(_)) => ", or put it into that root",
        _ => ", or install it",
    };
    let text = format!("{kind} {needed:?} is not in {place}; {mend}{key}");
    if what == "loader" {
        ArtifactError::LoaderMissing(text)
    } else {
        ArtifactError::ScriptUnrunnable(text)
    }
}

fn bound(needed: &str, filesystem: &Filesystem) -> bool {
    filesystem.binds.iter().any(|bind| Path::new(needed).starts_with(&bind.target))
}

fn in_root(needed: &str, root: &Root) -> bool {
    match root {
        Root::Empty => false,
        Root::Host => shown(needed) && on_host(needed),
        Root::Directory(directory) => in_directory(needed, directory),
    }
}

fn shown(needed: &str) -> bool {
    needed.starts_with("/lib") || SHOWN.iter().any(|top| Path::new(needed).starts_with(top))
}

fn on_host(needed: &str) -> bool {
    !matches!(fs::metadata(needed), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// Looks the path up as the run will, with absolute symbolic links staying inside.
fn in_directory(needed: &str, directory: &Path) -> bool {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let Ok(root) = rustix::fs::openat(CWD, directory, flags, FileMode::empty()) else {
        return true;
    };
    let found = rustix::fs::openat2(&root, needed, flags, FileMode::empty(), ResolveFlags::IN_ROOT);
    !matches!(found, Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::plan::Bind;

    fn filesystem(root: Root) -> Filesystem {
        Filesystem { root, tmp: None, tmp_exec: false, binds: Vec::new() }
    }

    fn dynamic(loader: &str) -> Executable {
        Executable::Dynamic { loader: loader.to_owned() }
    }

    fn script(interpreter: &str) -> Executable {
        Executable::Script { interpreter: interpreter.to_owned(), argument: None }
    }

    #[test]
    fn an_empty_root_runs_static_programs_only() {
        let empty = filesystem(Root::Empty);
        assert!(check(&Executable::Static, Mode::Jail, &empty, &[]).is_ok());
        let error = check(&dynamic("/lib64/ld.so"), Mode::Jail, &empty, &[]).unwrap_err();
        let text = error.to_string();
        for part in ["/lib64/ld.so", "static", "root = \"host\""] {
            assert!(text.contains(part), "{text}");
        }
        let mut with_bind = empty.clone();
        with_bind.binds.push(Bind {
            source: "/lib64".into(),
            target: "/lib64".into(),
            read_only: true,
        });
        assert!(check(&dynamic("/lib64/ld.so"), Mode::Jail, &with_bind, &[]).is_ok());
    }

    #[test]
    fn the_hosts_root_has_what_the_host_shows() {
        let host = filesystem(Root::Host);
        let present = "/bin/sh";
        assert!(check(&dynamic(present), Mode::Jail, &host, &[]).is_ok());
        assert!(check(&dynamic("/lib/no-such-loader"), Mode::Jail, &host, &[]).is_err());
        assert!(check(&dynamic("/proc/self/exe"), Mode::Jail, &host, &[]).is_err(), "not shown");
        assert!(check(&dynamic("/proc/self/exe"), Mode::Direct, &host, &[]).is_ok());
    }

    #[test]
    fn a_directory_is_searched_as_a_root() {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        fs::create_dir(at("real")).unwrap();
        fs::write(at("real/ld.so"), "").unwrap();
        std::os::unix::fs::symlink("/real", at("lib64")).unwrap();
        let root = filesystem(Root::Directory(directory.path().to_owned()));
        assert!(check(&dynamic("/lib64/ld.so"), Mode::Jail, &root, &[]).is_ok());
        assert!(check(&dynamic("/lib64/other.so"), Mode::Jail, &root, &[]).is_err());
        assert!(check(&dynamic("/../../bin/sh"), Mode::Jail, &root, &[]).is_err());
    }

    #[test]
    fn interpreters_must_be_listed_and_there() {
        let host = filesystem(Root::Host);
        let listed = ["/bin/sh".to_owned(), "/bin/no-such-shell".to_owned()];
        assert!(check(&script("/bin/sh"), Mode::Jail, &host, &listed).is_ok());
        for mode in [Mode::Jail, Mode::Direct] {
            assert!(matches!(
                check(&script("/bin/dash"), mode, &host, &listed),
                Err(ArtifactError::ScriptNotAllowed { .. })
            ));
        }
        assert!(matches!(
            check(&script("/bin/no-such-shell"), Mode::Jail, &host, &listed),
            Err(ArtifactError::ScriptUnrunnable(_))
        ));
    }
}
