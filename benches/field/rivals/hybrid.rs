//! crun refuses to work where cgroup v1 and v2 are mounted side by side and v2 has a controller.
//! While the contestants run, this process and what it spawns don't see the v2 side; a server that
//! was started before does.

use std::{fs::File, path::Path};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::Outcome;

const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// The mounts as they were; entered again when dropped. Not to be sent to another thread.
pub struct Hidden {
    before: File,
    _of_this_thread: std::marker::PhantomData<*const ()>,
}

/// Hides it, where it is there and where that is allowed, from this thread and those it makes.
pub fn hide() -> Outcome<Option<Hidden>> {
    if !Path::new(UNIFIED).join("cgroup.procs").exists() || !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    let before = File::open("/proc/thread-self/ns/mnt")?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let hidden = Hidden { before, _of_this_thread: std::marker::PhantomData };
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    umount2(UNIFIED, MntFlags::MNT_DETACH)?;
    Ok(Some(hidden))
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.before, CloneFlags::CLONE_NEWNS) {
            eprintln!("field: the mounts as they were: {error}");
        }
    }
}
