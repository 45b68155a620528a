//! Deciding what a jail's root is made of, before anything is mounted.
//!
//! The root is always a small tmpfs of our own with things put into it; none
//! of it is ever a directory that a tenant could have written. `mounts` then
//! does what is decided here.

use std::{
    ffi::{CString, OsString},
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{MetadataExt, PermissionsExt},
        },
    },
    path::{Component, Path, PathBuf},
};

use super::{
    blueprint::{BindPiece, INSIDE_ID, PIECES_MAX, Piece, RootPlan, ServicePlan, TmpPlan},
    message::{SCRIPT_PATH, SERVICE_SOCKET},
    plan::{Bind, Filesystem, Root},
};
use crate::units::Limit;

/// Attributes of everything that comes from the host.
const SHOWN: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
const READ_ONLY: u64 = SHOWN | libc::MOUNT_ATTR_RDONLY;

/// What `root = "host"` shows, as far as the host has it.
const HOST_DIRECTORIES: [&str; 8] =
    ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt"];
/// Of /etc, only what a dynamic program needs to load and to find the time.
const HOST_ETC: [&str; 7] = [
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "alternatives",
    "ssl/certs",
    "localtime",
    "nsswitch.conf",
];
const MADE_UP_ETC: [(&str, &str); 4] = [
    ("etc/passwd", "nobody:x:65534:65534:nobody:/tmp:/usr/sbin/nologin\n"),
    ("etc/group", "nogroup:x:65534:\n"),
    ("etc/hosts", MADE_UP_HOSTS),
    ("etc/resolv.conf", MADE_UP_RESOLV_CONF),
];
/// In place of the host's /etc/hosts.
pub const MADE_UP_HOSTS: &str = "127.0.0.1 localhost\n::1 localhost\n";
/// In place of the host's name servers.
pub const MADE_UP_RESOLV_CONF: &str = "";

/// The plan, and what must stay open until init has carried it out.
#[derive(Debug)]
pub struct DecidedRoot {
    /// For init.
    pub plan: RootPlan,
    /// User namespaces of idmapped binds; the plan has their numbers.
    pub namespaces: Vec<OwnedFd>,
}

/// Why a root can't be made.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A path of the policy's can't be used.
    #[error("{path}: {why}")]
    Path {
        /// Which.
        path: PathBuf,
        /// What is wrong with it and what to do.
        why: String,
    },
    /// Something the kernel refused.
    #[error("{what}: {error}")]
    System {
        /// What was being done.
        what: String,
        /// Why it failed.
        error: io::Error,
    },
}

/// A `#!` executable to show.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    /// Its sealed memfd.
    pub fd: i32,
    /// Its length in bytes.
    pub size: u64,
}

/// What this launcher can do for binds, and for whom.
#[derive(Clone, Copy, Debug)]
pub enum Ownership {
    /// Root: binds may be idmapped to the run's own uid.
    Idmap {
        /// The host uid (and gid) of the program.
        program: u32,
    },
    /// Not root: the program has the launcher's own uid.
    Plain {
        /// That uid.
        uid: u32,
    },
    /// Docker, which can't idmap.
    Docker,
}

/// Decides the root for one run; where it `listens`, with a directory for a socket of its
/// own, which but for Docker's is in the plan.
///
/// # Errors
/// [`RootError`] names the path: missing, behind a symlink, or with an owner
/// that can't be mapped safely.
pub fn decide(
    filesystem: &Filesystem,
    script: Option<Script>,
    ownership: Ownership,
    listens: bool,
) -> Result<DecidedRoot, RootError> {
    let mut pieces = Vec::new();
    match &filesystem.root {
        Root::Empty => {}
        Root::Host => host_pieces(&mut pieces)?,
        Root::Directory(directory) => {
            let anew = made_anew(matches!(ownership, Ownership::Docker), listens);
            directory_pieces(directory, anew, &mut pieces)?;
        }
    }
    let service = if listens { service_pieces(filesystem, ownership, &mut pieces)? } else { None };
    if let Some(Script { fd, size }) = script {
        let path = SCRIPT_PATH.trim_start_matches('/');
        directories_above(Path::new(path), &mut pieces);
        pieces.push(Piece::Script { path: c_string(path.as_bytes()), source: fd, size });
    }
    let mut namespaces = Vec::new();
    for bind in &filesystem.binds {
        let piece = bind_piece(bind, ownership, &mut namespaces)?;
        let target = Path::new(std::ffi::OsStr::from_bytes(piece.target.as_bytes())).to_owned();
        directories_above(&target, &mut pieces);
        pieces.push(Piece::Bind(piece));
    }
    if pieces.len() > PIECES_MAX {
        return Err(RootError::Path {
            path: PathBuf::from("/"),
            why: format!("has {} entries to show; at most {PIECES_MAX} are possible", pieces.len()),
        });
    }
    // Room for the script and for made-up files; the rest are directories.
    let size = script.map_or(0, |script| script.size) + (256 << 10);
    let plan = RootPlan {
        size: c_string(size.to_string().as_bytes()),
        make_devices: matches!(ownership, Ownership::Idmap { .. }),
        tmp: filesystem.tmp.map(|size| tmp_plan(size, filesystem.tmp_exec)),
        service,
        pieces,
    };
    Ok(DecidedRoot { plan, namespaces })
}

/// A host path as it was when a root was decided by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    path: PathBuf,
    /// Device, inode, mode, owner and group; `None` where there was nothing.
    as_it_was: Option<(u64, u64, u32, u32, u32)>,
}

/// The directories of a root that are made anew, with what is in them: something of ours is
/// below, or of Docker's, which can't be made in the root's own.
#[must_use]
pub fn made_anew(by_docker: bool, listens: bool) -> &'static [&'static str] {
    match (by_docker, listens) {
        (true, _) => &["etc", "run"],
        (false, true) => &["run"],
        (false, false) => &[],
    }
}

/// Every host path that [`decide`] goes by: as long as this stays the same, so does
/// what it decides; `anew` are [`made_anew`].
#[must_use]
pub fn seen(filesystem: &Filesystem, anew: &[&str]) -> Vec<Seen> {
    let root = Path::new("/");
    let mut paths: Vec<PathBuf> = match &filesystem.root {
        Root::Empty => Vec::new(),
        Root::Host => {
            let etc = HOST_ETC.iter().map(|name| root.join("etc").join(name));
            HOST_DIRECTORIES.iter().map(|name| root.join(name)).chain(etc).collect()
        }
        Root::Directory(directory) => {
            let entries = |directory: &Path| {
                let entries = fs::read_dir(directory).into_iter().flatten().take(PIECES_MAX + 1);
                entries.flatten().map(|entry| entry.path()).collect::<Vec<_>>()
            };
            let mut paths = entries(directory);
            for name in anew {
                paths.extend(entries(&directory.join(name)));
            }
            paths.sort();
            paths.push(directory.clone());
            paths
        }
    };
    paths.extend(filesystem.binds.iter().map(|bind| bind.source.clone()));
    let look = |path: PathBuf| {
        let found = fs::symlink_metadata(&path).ok();
        let as_it_was =
            found.map(|it| (it.dev(), it.ino(), it.permissions().mode(), it.uid(), it.gid()));
        Seen { path, as_it_was }
    };
    paths.into_iter().map(look).collect()
}

fn tmp_plan(size: Limit<u64>, exec: bool) -> TmpPlan {
    // tmpfs takes 0 for "no limit"; the run's memory limit holds all the same.
    let bytes = size.finite().map_or(0, |bytes| bytes.max(4096));
    let inodes = if bytes == 0 { 0 } else { (bytes / 4096).max(1024) };
    TmpPlan {
        size: c_string(bytes.to_string().as_bytes()),
        inodes: c_string(inodes.to_string().as_bytes()),
        exec,
    }
}

fn host_pieces(pieces: &mut Vec<Piece>) -> Result<(), RootError> {
    for name in HOST_DIRECTORIES {
        entry(Path::new("/"), name.as_ref(), pieces)?;
    }
    pieces.push(Piece::Directory(c_string(b"etc")));
    for name in HOST_ETC {
        let path = Path::new("etc").join(name);
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("etc")) {
            pieces.push(Piece::Directory(c_string(parent.as_os_str().as_bytes())));
        }
        entry(Path::new("/"), &path, pieces)?;
    }
    for (path, content) in MADE_UP_ETC {
        pieces.push(Piece::File {
            path: c_string(path.as_bytes()),
            content: content.as_bytes().to_vec(),
        });
    }
    Ok(())
}

/// The directory that [`SERVICE_SOCKET`] is in.
#[must_use]
pub fn service_directory() -> &'static Path {
    Path::new(SERVICE_SOCKET).parent().unwrap_or(Path::new("/"))
}

/// The place for a service's own socket, and what is mounted there.
fn service_pieces(
    filesystem: &Filesystem,
    ownership: Ownership,
    pieces: &mut Vec<Piece>,
) -> Result<Option<ServicePlan>, RootError> {
    let directory = service_directory();
    // Policies with such a bind are refused when they are read.
    if let Some(bind) = filesystem.binds.iter().find(|bind| bind.target.starts_with(directory)) {
        let why = format!("is bound where a service has its socket, in {}", directory.display());
        return Err(RootError::Path { path: bind.target.clone(), why });
    }
    directories_above(Path::new(SERVICE_SOCKET.trim_start_matches('/')), pieces);
    let owner = match ownership {
        Ownership::Idmap { program } => program,
        // There the user namespace comes first, and with it the program's number in it.
        Ownership::Plain { .. } => INSIDE_ID,
        Ownership::Docker => return Ok(None),
    };
    let target = directory.strip_prefix("/").unwrap_or(directory);
    Ok(Some(ServicePlan {
        target: c_string(target.as_os_str().as_bytes()),
        owner: c_string(owner.to_string().as_bytes()),
    }))
}

/// Every entry of a directory but those that we make ourselves.
fn directory_pieces(
    directory: &Path,
    anew: &[&str],
    pieces: &mut Vec<Piece>,
) -> Result<(), RootError> {
    for name in names_in(directory)? {
        match name.as_bytes() {
            b"proc" | b"dev" | b"tmp" => {}
            _ if anew.iter().any(|one| name == **one) => {
                inner_pieces(directory, Path::new(&name), pieces)?;
            }
            _ => entry(directory, Path::new(&name), pieces)?,
        }
    }
    Ok(())
}

/// The names in a directory, sorted; one more than could be shown at most.
fn names_in(directory: &Path) -> Result<Vec<OsString>, RootError> {
    let failed = |error: io::Error| RootError::Path {
        path: directory.to_owned(),
        why: format!("can't be read as a root: {error}"),
    };
    let mut names = Vec::new();
    for item in fs::read_dir(directory).map_err(failed)?.take(PIECES_MAX + 1) {
        names.push(item.map_err(failed)?.file_name());
    }
    names.sort();
    Ok(names)
}

/// A directory of a root, made anew with what is in it but for what is ours.
fn inner_pieces(root: &Path, name: &Path, pieces: &mut Vec<Piece>) -> Result<(), RootError> {
    let whole = root.join(name);
    let metadata = fs::symlink_metadata(&whole).map_err(|error| system(&whole, error))?;
    if !metadata.is_dir() {
        let why = "is no directory, and something of the run's own would be in it; make it one, \
                   or remove it";
        return Err(RootError::Path { path: whole, why: why.to_owned() });
    }
    pieces.push(Piece::Directory(c_string(name.as_os_str().as_bytes())));
    let ours = [Some(service_directory()), Path::new(SCRIPT_PATH).parent()];
    for inside in names_in(&whole)? {
        let inside = name.join(inside);
        if !ours.contains(&Some(&Path::new("/").join(&inside))) {
            entry(root, &inside, pieces)?;
        }
    }
    Ok(())
}

/// One entry of the host's: a symlink is made anew with the same content,
/// anything else is bound read-only. What isn't there is left out.
fn entry(base: &Path, name: &Path, pieces: &mut Vec<Piece>) -> Result<(), RootError> {
    let source = base.join(name);
    let metadata = match fs::symlink_metadata(&source) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system(&source, error)),
    };
    let target = c_string(name.as_os_str().as_bytes());
    if metadata.is_symlink() {
        let content = fs::read_link(&source).map_err(|error| system(&source, error))?;
        let content = c_string(&content.into_os_string().into_vec());
        pieces.push(Piece::Symlink { content, path: target });
    } else if metadata.is_dir() || metadata.is_file() {
        pieces.push(Piece::Bind(BindPiece {
            source: c_string(source.as_os_str().as_bytes()),
            target,
            directory: metadata.is_dir(),
            attributes: READ_ONLY,
            idmap: None,
            optional: true,
        }));
    }
    Ok(())
}

fn bind_piece(
    bind: &Bind,
    ownership: Ownership,
    namespaces: &mut Vec<OwnedFd>,
) -> Result<BindPiece, RootError> {
    let refuse = |why: String| RootError::Path { path: bind.source.clone(), why };
    let metadata = fs::symlink_metadata(&bind.source)
        .map_err(|error| refuse(format!("can't be bound: {error}")))?;
    if metadata.is_symlink() {
        return Err(refuse("is a symbolic link; name what it points to".into()));
    }
    if !metadata.is_dir() && !metadata.is_file() {
        return Err(refuse("is neither a directory nor a file".into()));
    }
    let mode = metadata.permissions().mode();
    let world_readable = mode & 0o004 != 0 && (metadata.is_file() || mode & 0o001 != 0);
    let owner = (metadata.uid(), metadata.gid());
    // The next run to draw the same uid must not be able to read what this one
    // wrote: on disk, files belong to the directory's owner, never to a pool uid.
    // (That the run can't leave set-user-id files of that owner's is the filter's part.)
    let idmap = match ownership {
        _ if bind.read_only && world_readable => None,
        Ownership::Plain { uid } if owner.0 == uid => None,
        Ownership::Plain { .. } => {
            return Err(refuse(
                "is writable or not world-readable and belongs to another user; without root it can't be idmapped: bind a directory of the dispatcher's own user"
                    .into(),
            ));
        }
        Ownership::Docker => {
            return Err(refuse(
                "is writable or not world-readable, and Docker can't idmap it to the program's user: make it readable by all and bind it read_only, or write mode = \"jail\""
                    .into(),
            ));
        }
        Ownership::Idmap { program } => {
            let namespace = super::identity::idmap_namespace(owner, program)
                .map_err(|error| system(&bind.source, error))?;
            let number = namespace.as_raw_fd();
            namespaces.push(namespace);
            Some(number)
        }
    };
    let relative: PathBuf =
        bind.target.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    Ok(BindPiece {
        source: c_string(bind.source.as_os_str().as_bytes()),
        target: c_string(relative.as_os_str().as_bytes()),
        directory: metadata.is_dir(),
        attributes: if bind.read_only { READ_ONLY } else { SHOWN | libc::MOUNT_ATTR_NOEXEC },
        idmap,
        optional: false,
    })
}

fn directories_above(path: &Path, pieces: &mut Vec<Piece>) {
    let mut above: Vec<_> = path.ancestors().skip(1).collect();
    above.pop(); // the empty path
    for directory in above.into_iter().rev() {
        pieces.push(Piece::Directory(c_string(directory.as_os_str().as_bytes())));
    }
}

fn system(path: &Path, error: io::Error) -> RootError {
    RootError::System { what: path.display().to_string(), error }
}

/// Paths and numbers: the file system never gives a NUL, and policies with one
/// are refused when they are loaded. A NUL here ends the string early.
fn c_string(bytes: &[u8]) -> CString {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    CString::new(&bytes[..end]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filesystem(root: Root) -> Filesystem {
        Filesystem { root, tmp: Some(Limit::At(64 << 20)), tmp_exec: false, binds: vec![] }
    }

    const PLAIN: Ownership = Ownership::Plain { uid: 12345 };

    #[test]
    fn an_empty_root_has_nothing_of_the_hosts() {
        let decided = decide(&filesystem(Root::Empty), None, PLAIN, false).unwrap();
        assert!(decided.plan.pieces.is_empty());
        let tmp = decided.plan.tmp.unwrap();
        assert_eq!(tmp.size.to_bytes(), b"67108864");
        assert!(!tmp.exec);
    }

    #[test]
    fn everything_of_the_hosts_is_read_only() {
        let decided = decide(&filesystem(Root::Host), None, PLAIN, false).unwrap();
        let mut binds = 0;
        for piece in &decided.plan.pieces {
            if let Piece::Bind(bind) = piece {
                binds += 1;
                assert_eq!(bind.attributes, READ_ONLY, "{bind:?}");
            }
        }
        assert!(binds > 0);
        let shown = format!("{:?}", decided.plan.pieces);
        assert!(!shown.contains("shadow") && shown.contains("etc/passwd"), "{shown}");
    }

    #[test]
    fn a_bind_is_mapped_refused_or_harmless() {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut with_bind = filesystem(Root::Empty);
        with_bind.binds = vec![Bind {
            source: directory.path().to_owned(),
            target: "/data/in".into(),
            read_only: true,
        }];
        let decided = decide(&with_bind, None, PLAIN, false).unwrap();
        assert!(matches!(
            &decided.plan.pieces[..],
            [Piece::Directory(data), Piece::Bind(BindPiece { idmap: None, .. })]
                if data.to_bytes() == b"data"
        ));
        with_bind.binds[0].read_only = false;
        let error = decide(&with_bind, None, PLAIN, false).unwrap_err().to_string();
        assert!(error.contains("another user"), "{error}");
        let own = Ownership::Plain { uid: rustix::process::geteuid().as_raw() };
        let decided = decide(&with_bind, None, own, false).unwrap();
        let Some(Piece::Bind(bind)) = decided.plan.pieces.last() else { panic!("{decided:?}") };
        assert_eq!(bind.attributes & libc::MOUNT_ATTR_RDONLY, 0);
        assert_ne!(bind.attributes & libc::MOUNT_ATTR_NOEXEC, 0, "written is not executed");
    }

    #[test]
    fn a_symlink_is_not_bound() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/etc", &link).unwrap();
        let mut with_bind = filesystem(Root::Empty);
        with_bind.binds = vec![Bind { source: link, target: "/x".into(), read_only: true }];
        let error = decide(&with_bind, None, PLAIN, false).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
    }

    #[test]
    fn a_service_has_a_place_that_nothing_covers() {
        let decided = decide(&filesystem(Root::Empty), None, PLAIN, true).unwrap();
        let service = decided.plan.service.unwrap();
        assert_eq!(service.target.to_bytes(), b"run/grpc");
        assert_eq!(service.owner.to_bytes(), INSIDE_ID.to_string().as_bytes());
        let idmap = Ownership::Idmap { program: 2_000_000 };
        let decided = decide(&filesystem(Root::Empty), None, idmap, true).unwrap();
        assert_eq!(decided.plan.service.unwrap().owner.to_bytes(), b"2000000");
        assert!(matches!(&decided.plan.pieces[..], [Piece::Directory(run), Piece::Directory(grpc)]
                if run.to_bytes() == b"run" && grpc.to_bytes() == b"run/grpc"));
        let docker = decide(&filesystem(Root::Empty), None, Ownership::Docker, true).unwrap();
        assert!(docker.plan.service.is_none() && docker.plan.pieces.len() == 2);
        let exec = decide(&filesystem(Root::Empty), None, idmap, false).unwrap();
        assert!(exec.plan.service.is_none() && exec.plan.pieces.is_empty());

        let mut covered = filesystem(Root::Empty);
        let (source, target) = ("/".into(), "/run/grpc/inside".into());
        covered.binds.push(Bind { source, target, read_only: true });
        let error = decide(&covered, None, PLAIN, true).unwrap_err().to_string();
        assert!(error.contains("/run/grpc"), "{error}");
        assert!(decide(&covered, None, PLAIN, false).is_ok());
    }
    /// Docker mounts in /etc and /run, which it couldn't in a directory that is read-only.
    #[test]
    fn of_a_directory_what_docker_mounts_in_is_shown_by_its_parts() {
        let directory = tempfile::tempdir().unwrap();
        for inside in ["etc/ssl", "run/dispatcher", "run/lock", "usr"] {
            fs::create_dir_all(directory.path().join(inside)).unwrap();
        }
        fs::write(directory.path().join("etc/hosts"), "").unwrap();
        let shown = |ownership| {
            let root = filesystem(Root::Directory(directory.path().to_owned()));
            let decided = decide(&root, None, ownership, false).unwrap();
            let path = |piece: &Piece| match piece {
                Piece::Bind(bind) => bind.target.to_string_lossy().into_owned(),
                Piece::Directory(path) => format!("{}/", path.to_string_lossy()),
                other => panic!("{other:?}"),
            };
            decided.plan.pieces.iter().map(path).collect::<Vec<_>>()
        };
        assert_eq!(shown(PLAIN), ["etc", "run", "usr"]);
        let by_parts = ["etc/", "etc/hosts", "etc/ssl", "run/", "run/lock", "usr"];
        assert_eq!(shown(Ownership::Docker), by_parts);

        let seen = |by_docker| {
            let root = filesystem(Root::Directory(directory.path().to_owned()));
            seen(&root, made_anew(by_docker, false))
        };
        let before = (seen(false), seen(true));
        fs::write(directory.path().join("etc/resolv.conf"), "").unwrap();
        assert_eq!(seen(false), before.0);
        assert_ne!(seen(true), before.1);
    }
}
