//! The jail's root, made by the new mount API, mount_setattr(2) and friends.
//!
//! Runs in init, a cloned child: only system calls, no allocation. The order
//! is the point:
//!
//! 1. clone the host paths, while the host's root can still be seen;
//! 2. switch to an empty root of our own and drop the host's;
//! 3. only then walk paths: nothing a path can lead to is the host's any more;
//! 4. make it read-only.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags,
    },
};

use super::{
    blueprint::{BindPiece, PIECES_MAX, Piece, RootPlan, ServicePlan, TmpPlan},
    step::{Fault, Step, StepError},
};

/// Device nodes of a jail: name, major, minor (Documentation/admin-guide/devices.txt).
pub const DEVICES: [(&CStr, u32, u32); 5] =
    [(c"null", 1, 3), (c"zero", 1, 5), (c"full", 1, 7), (c"random", 1, 8), (c"urandom", 1, 9)];

const NO_ATTRIBUTES: MountAttrFlags = MountAttrFlags::empty();

/// Builds the root and enters it.
///
/// # Errors
/// The step, the number of its item, and errno.
pub fn enter_new_root(plan: &RootPlan, fault: Fault) -> Result<(), StepError> {
    at(fault, Step::Private, 0, detach_from_host())?;
    let mut sources = [-1; PIECES_MAX];
    clone_sources(plan, fault, &mut sources)?;
    let proc = at(fault, Step::Proc, 0, make_proc())?;
    let dev = at(fault, Step::Dev, 0, make_dev(plan.make_devices))?;
    let mut nodes = [-1; DEVICES.len()];
    if !plan.make_devices {
        for (index, (name, major, minor)) in DEVICES.iter().enumerate() {
            nodes[index] = at(fault, Step::Dev, index, borrow_device(name, *major, *minor))?;
        }
    }
    let tmp = match &plan.tmp {
        Some(tmp) => Some(at(fault, Step::Tmp, 0, make_tmp(tmp))?),
        None => None,
    };
    let service = match &plan.service {
        Some(service) => {
            Some((at(fault, Step::ServiceDirectory, 0, make_service(service))?, service))
        }
        None => None,
    };
    let root = at(fault, Step::Root, 0, make_root(&plan.size, tmp.is_some()))?;
    at(fault, Step::Pivot, 0, switch_root(&root))?;

    at(fault, Step::Populate, 0, attach(&proc, c"proc"))?;
    at(fault, Step::Populate, 0, attach(&dev, c"dev"))?;
    for (node, (name, ..)) in nodes.iter().zip(DEVICES).filter(|(node, _)| **node >= 0) {
        at(fault, Step::Dev, 0, attach_device(*node, name))?;
    }
    if let Some(tmp) = tmp {
        at(fault, Step::Populate, 0, attach(&tmp, c"tmp"))?;
    }
    for (index, piece) in plan.pieces.iter().enumerate() {
        at(fault, Step::Populate, index, put(piece, sources[index]))?;
    }
    // After the pieces: one of them made its place, and none covers it.
    if let Some((mount, service)) = service {
        at(fault, Step::ServiceDirectory, 0, attach(&mount, &service.target))?;
    }
    at(fault, Step::Readonly, 0, make_read_only())
}

/// Makes an empty root with its /dev, and places for /proc and, `with_tmp`, /tmp; and
/// enters it. What [`enter_copy_of`] takes.
///
/// # Errors
/// The step, the number of its item, and errno.
pub fn enter_empty_root(size: &CStr, with_tmp: bool, fault: Fault) -> Result<(), StepError> {
    at(fault, Step::Private, 0, detach_from_host())?;
    let dev = at(fault, Step::Dev, 0, make_dev(true))?;
    let root = at(fault, Step::Root, 0, make_root(size, with_tmp))?;
    at(fault, Step::Pivot, 0, switch_root(&root))?;
    at(fault, Step::Populate, 0, attach(&dev, c"dev"))?;
    at(fault, Step::Readonly, 0, make_read_only())
}

/// Enters a copy of a mount namespace that [`enter_empty_root`] made, and adds what is
/// the run's own. The descriptor goes.
///
/// # Errors
/// As above.
pub fn enter_copy_of(namespace: RawFd, plan: &RootPlan, fault: Fault) -> Result<(), StepError> {
    // While a whole /proc can be seen: without one, root of a user namespace may mount
    // none (`mount_too_revealing`, fs/namespace.c).
    let proc = at(fault, Step::Proc, 0, make_proc())?;
    let tmp = match &plan.tmp {
        Some(tmp) => Some(at(fault, Step::Tmp, 0, make_tmp(tmp))?),
        None => None,
    };
    at(fault, Step::EnterRoot, 0, enter_copy(namespace))?;
    at(fault, Step::Populate, 0, attach(&proc, c"proc"))?;
    if let Some(tmp) = tmp {
        at(fault, Step::Populate, 0, attach(&tmp, c"tmp"))?;
    }
    Ok(())
}

/// Entering one makes its root the working directory, setns(2); so does copying it.
fn enter_copy(namespace: RawFd) -> io::Result<()> {
    let namespace = reclaim(namespace);
    rustix::thread::move_into_link_name_space(
        namespace.as_fd(),
        Some(rustix::thread::LinkNameSpaceType::Mount),
    )?;
    crate::sys::unshare(rustix::thread::UnshareFlags::NEWNS)
}

fn at<T>(fault: Fault, step: Step, index: usize, result: io::Result<T>) -> Result<T, StepError> {
    let error = |errno| StepError { step, index: index as u16, errno };
    if fault.hits(step) {
        return Err(error(libc::EIO));
    }
    result.map_err(|e| error(e.raw_os_error().unwrap_or(libc::EIO)))
}

/// Nothing mounted here may reach the host, nor the reverse, mount_namespaces(7).
fn detach_from_host() -> io::Result<()> {
    Ok(rustix::mount::mount_change(
        c"/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )?)
}

fn clone_sources(
    plan: &RootPlan,
    fault: Fault,
    sources: &mut [RawFd; PIECES_MAX],
) -> Result<(), StepError> {
    for (index, piece) in plan.pieces.iter().enumerate() {
        let Piece::Bind(bind) = piece else { continue };
        match clone_source(bind) {
            Err(error) if bind.optional && error.kind() == io::ErrorKind::NotFound => {}
            result => sources[index] = at(fault, Step::Sources, index, result)?,
        }
    }
    Ok(())
}

/// A detached copy of a host path's mount, with its attributes set before
/// anything can see it.
fn clone_source(bind: &BindPiece) -> io::Result<RawFd> {
    // A symlink on the way could have been put there by somebody else.
    let source = rustix::fs::openat2(
        CWD,
        bind.source.as_c_str(),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )?;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    // An idmapped tree must be one mount; otherwise what is mounted below comes along.
    if bind.idmap.is_none() {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = rustix::mount::open_tree(&source, c"", flags)?;
    set_attributes(tree.as_fd(), c"", bind.attributes, bind.idmap)?;
    Ok(leak(tree))
}

/// procfs of our own pid namespace: our processes and nothing else of the
/// kernel's; other users' processes invisible, and nothing writable.
fn make_proc() -> io::Result<OwnedFd> {
    let fs = rustix::mount::fsopen(c"proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&fs, c"subset", c"pid")?;
    rustix::mount::fsconfig_set_string(&fs, c"hidepid", c"invisible")?;
    rustix::mount::fsconfig_create(&fs)?;
    mount_of(
        &fs,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

/// A tmpfs with the five nodes, or (where only the initial user namespace may
/// make nodes) with five empty files to mount the host's on. Nodes of our own
/// are better: a lock on the host's would be seen by every other run.
fn make_dev(make_devices: bool) -> io::Result<OwnedFd> {
    let fs = new_tmpfs(c"64k", c"16", c"0755")?;
    let dev = mount_of(&fs, MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
    for (name, major, minor) in DEVICES {
        let (kind, device) = if make_devices {
            (rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(major, minor))
        } else {
            (rustix::fs::FileType::RegularFile, 0)
        };
        rustix::fs::mknodat(&dev, name, kind, Mode::from_raw_mode(0o666), device)?;
    }
    Ok(dev)
}

/// The host's own node, if it is really that: /dev may have been tampered with.
fn borrow_device(name: &CStr, major: u32, minor: u32) -> io::Result<RawFd> {
    let dev = rustix::fs::openat2(
        CWD,
        c"/dev",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )?;
    let node = rustix::fs::openat2(
        &dev,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH,
    )?;
    let stat = rustix::fs::fstat(&node)?;
    let is_device =
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice;
    if !is_device || stat.st_rdev != rustix::fs::makedev(major, minor) {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let tree = rustix::mount::open_tree(
        &node,
        c"",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH,
    )?;
    // Read-only is about the node's inode; writing to the device stays possible.
    const NODE: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    set_attributes(tree.as_fd(), c"", NODE, None)?;
    Ok(leak(tree))
}

fn attach_device(node: RawFd, name: &CStr) -> io::Result<()> {
    let dev = rustix::fs::open(
        c"/dev",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let node = reclaim(node);
    Ok(rustix::mount::move_mount(&node, c"", &dev, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn make_tmp(tmp: &TmpPlan) -> io::Result<OwnedFd> {
    let fs = new_tmpfs(&tmp.size, &tmp.inodes, c"1777")?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    if !tmp.exec {
        attributes |= MountAttrFlags::MOUNT_ATTR_NOEXEC;
    }
    mount_of(&fs, attributes)
}

/// Room for sockets and a few small files, for the program alone.
fn make_service(service: &ServicePlan) -> io::Result<OwnedFd> {
    let fs = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [
        (c"size", c"64k"),
        (c"nr_inodes", c"16"),
        (c"mode", c"0700"),
        (c"uid", &*service.owner),
        (c"gid", &*service.owner),
    ] {
        rustix::mount::fsconfig_set_string(&fs, key, value)?;
    }
    rustix::mount::fsconfig_create(&fs)?;
    mount_of(
        &fs,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

fn make_root(size: &CStr, with_tmp: bool) -> io::Result<OwnedFd> {
    let fs = new_tmpfs(size, c"1024", c"0755")?;
    let root = mount_of(&fs, NO_ATTRIBUTES)?;
    let directories = [c"proc", c"dev", c"tmp"];
    for directory in &directories[..if with_tmp { 3 } else { 2 }] {
        rustix::fs::mkdirat(&root, *directory, Mode::from_raw_mode(0o755))?;
    }
    Ok(root)
}

fn new_tmpfs(size: &CStr, inodes: &CStr, mode: &CStr) -> io::Result<OwnedFd> {
    let fs = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&fs, c"size", size)?;
    rustix::mount::fsconfig_set_string(&fs, c"nr_inodes", inodes)?;
    rustix::mount::fsconfig_set_string(&fs, c"mode", mode)?;
    rustix::mount::fsconfig_create(&fs)?;
    Ok(fs)
}

fn mount_of(fs: &OwnedFd, attributes: MountAttrFlags) -> io::Result<OwnedFd> {
    Ok(rustix::mount::fsmount(fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// pivot_root(2) into the new root and away with the old one. The new root
/// needs a place to be mounted on for a moment: /proc is the one directory
/// that is there on every host that can run us.
fn switch_root(root: &OwnedFd) -> io::Result<()> {
    rustix::mount::move_mount(root, c"", CWD, c"/proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    rustix::process::fchdir(root)?;
    rustix::process::pivot_root(c".", c".")?;
    // The old root now lies over the new one, at "."; nothing refers to it any more.
    rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir(c"/")?)
}

fn attach(mount: &OwnedFd, target: &CStr) -> io::Result<()> {
    Ok(rustix::mount::move_mount(mount, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Puts one piece in its place; the current directory is the new root.
fn put(piece: &Piece, source: RawFd) -> io::Result<()> {
    match piece {
        Piece::Directory(path) => make_directory(path),
        Piece::Symlink { content, path } => {
            Ok(rustix::fs::symlinkat(content.as_c_str(), CWD, path.as_c_str())?)
        }
        Piece::File { path, content } => {
            let file = make_file(path)?;
            write_all(&file, content)
        }
        Piece::Script { path, source, size } => copy_script(path, *source, *size),
        Piece::Bind(bind) => put_bind(bind, source),
    }
}

fn put_bind(bind: &BindPiece, source: RawFd) -> io::Result<()> {
    if source < 0 {
        return Ok(()); // optional and absent
    }
    if bind.directory {
        make_directory(&bind.target)?;
    } else if let Err(error) = make_file(&bind.target)
        && error.raw_os_error() != Some(libc::EEXIST)
    {
        return Err(error);
    }
    attach(&reclaim(source), &bind.target)
}

fn make_directory(path: &CStr) -> io::Result<()> {
    match rustix::fs::mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        // Below a read-only bind it must be there already.
        Err(rustix::io::Errno::ROFS)
            if rustix::fs::access(path, rustix::fs::Access::EXISTS).is_ok() =>
        {
            Ok(())
        }
        result => Ok(result?),
    }
}

fn make_file(path: &CStr) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        CWD,
        path,
        OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o444),
    )?)
}

fn write_all(file: &OwnedFd, mut content: &[u8]) -> io::Result<()> {
    while !content.is_empty() {
        let written = rustix::io::write(file, content)?;
        content = &content[written..];
    }
    Ok(())
}

fn copy_script(path: &CStr, source: RawFd, size: u64) -> io::Result<()> {
    let file = make_file(path)?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o555))?;
    // SAFETY: init was handed this descriptor for this purpose and keeps it open.
    let source = unsafe { BorrowedFd::borrow_raw(source) };
    let mut offset = 0;
    while offset < size {
        let left = usize::try_from(size - offset).unwrap_or(usize::MAX);
        if rustix::fs::sendfile(&file, source, Some(&mut offset), left)? == 0 {
            return Err(io::Error::from_raw_os_error(libc::EIO)); // shorter than it was
        }
    }
    Ok(())
}

fn make_read_only() -> io::Result<()> {
    const ROOT: u64 = libc::MOUNT_ATTR_RDONLY
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOEXEC;
    // Nodes must stay usable: no NODEV on /dev.
    const DEV: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    set_attributes(CWD, c"/dev", DEV, None)?;
    set_attributes(CWD, c"/", ROOT, None)
}

/// mount_setattr(2): adds attributes to one mount, or with an empty path to
/// the whole tree that the descriptor stands for. Only system calls.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn set_attributes(
    directory: BorrowedFd<'_>,
    path: &CStr,
    attributes: u64,
    idmap: Option<RawFd>,
) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attributes | if idmap.is_some() { libc::MOUNT_ATTR_IDMAP } else { 0 },
        attr_clr: 0,
        propagation: 0,
        userns_fd: idmap.map_or(0, |fd| fd as u64),
    };
    let mut flags = 0;
    if path.is_empty() {
        flags |= AtFlags::EMPTY_PATH.bits();
        if idmap.is_none() {
            flags |= libc::AT_RECURSIVE as u32;
        }
    }
    // SAFETY: path and attr outlive the call; the size is that of attr.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn leak(fd: OwnedFd) -> RawFd {
    std::os::fd::IntoRawFd::into_raw_fd(fd)
}

fn reclaim(fd: RawFd) -> OwnedFd {
    // SAFETY: the number came from `leak`, or is one of init's `keep` that it was told to
    // take; it is reclaimed once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
