//! Where in a hierarchy our instance directory goes, and what has to be changed
//! above it for that: all of it is written down, to be undone.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use rustix::{fs::Access, process::Pid};

use super::{
    Reason, files,
    layout::{Controller, Mount},
    mend, supervisor, v2,
};

/// Times that a controller is enabled, should another dispatcher disable it meanwhile.
const ATTEMPTS_MAX: usize = 8;

/// The directory to make ours in.
#[derive(Debug)]
pub(super) struct Place {
    /// It exists and can be written to.
    pub(super) parent: PathBuf,
    /// What its children can have of the controllers asked for.
    pub(super) controllers: Vec<Controller>,
    /// Why they cannot have the others.
    pub(super) lacks: Vec<(Controller, Reason)>,
    top: PathBuf,
    made: Vec<PathBuf>,
    enabled: Vec<(PathBuf, Controller)>,
    supervisor: Option<PathBuf>,
}

/// The place in a v1 hierarchy: the configured parent; else our own cgroup; else,
/// for root, the top.
///
/// # Errors
/// Why there is none.
pub(super) fn legacy(
    mount: &Mount,
    configured: Option<&Path>,
    controllers: &[Controller],
) -> Result<Place, Reason> {
    let mut place = Place::new(&mount.point, controllers.to_vec());
    let candidates = candidates(mount, configured, mount.own.clone());
    for candidate in &candidates {
        place.settle(candidate).map_err(|error| mend::unusable(candidate, &error))?;
        if let Err(error) = writable(candidate, &["cgroup.procs"]) {
            if *candidate == candidates[candidates.len() - 1] {
                place.undo();
                return Err(mend::legacy_not_writable(mount, candidate, &error));
            }
            continue;
        }
        return Ok(place);
    }
    Err(mend::outside(mount))
}

/// The place in the v2 hierarchy, with `wanted` controllers on for its children.
///
/// # Errors
/// Why there is none.
pub(super) fn unified(
    mount: &Mount,
    configured: Option<&Path>,
    wanted: &[Controller],
    own_pids: &[Pid],
) -> Result<Place, Reason> {
    let mut refused = mend::outside(mount);
    let mut without_controllers = None;
    for candidate in candidates(mount, configured, mount.own.as_deref().map(delegated_base)) {
        let mut place = Place::new(&mount.point, Vec::new());
        if let Err(error) = place.settle(&candidate) {
            refused = mend::unusable(&candidate, &error);
            continue;
        }
        if let Err(error) = writable(&candidate, &["cgroup.procs", "cgroup.subtree_control"]) {
            place.undo();
            refused = mend::unified_not_writable(&candidate, &error);
            continue;
        }
        place.adopt_leaf(mount.own.as_deref(), wanted);
        if place.enable_all(wanted, own_pids) {
            return Ok(place);
        }
        // Strangers live here. Without controllers it would still serve for
        // killing and counting; another candidate may give more.
        place.disable_all();
        if without_controllers.is_none() {
            without_controllers = Some(place);
        } else {
            place.undo();
        }
    }
    without_controllers.ok_or(refused)
}

fn candidates(mount: &Mount, configured: Option<&Path>, own: Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(parent) = configured {
        return vec![mount.point.join(parent)];
    }
    let mut list = Vec::from_iter(own);
    if rustix::process::geteuid().is_root() && !list.contains(&mount.point) {
        list.push(mount.point.clone());
    }
    list
}

/// Our own cgroup, or the one above where we sit in a leaf of it: one that an
/// earlier launcher of ours made, or one of systemd's `DelegateSubgroup=`.
fn delegated_base(own: &Path) -> PathBuf {
    let Some(above) = own.parent() else { return own.to_owned() };
    let ours = own.file_name().is_some_and(|name| name == supervisor::LEAF);
    let marked = ["trusted.delegate", "user.delegate"];
    let systemds = marked.iter().any(|mark| files::has_xattr(above, mark))
        && !marked.iter().any(|mark| files::has_xattr(own, mark))
        && files::processes(above).is_ok_and(|pids| pids.is_empty());
    if ours || systemds { above.to_owned() } else { own.to_owned() }
}

fn writable(directory: &Path, also: &[&str]) -> io::Result<()> {
    let check = |path: &Path| {
        rustix::fs::accessat(rustix::fs::CWD, path, Access::WRITE_OK, rustix::fs::AtFlags::EACCESS)
    };
    check(directory)?;
    for file in also {
        check(&directory.join(file))?;
    }
    Ok(())
}

/// Why a controller could not be enabled.
#[derive(Debug)]
pub(super) enum Refused {
    /// The hierarchy, as far as it is seen from here, does not have it.
    Absent,
    /// Processes that are not ours are in the way.
    Occupied {
        /// Where.
        directory: PathBuf,
        /// Who, 0 for those of an outer pid namespace.
        strangers: Vec<i32>,
    },
    /// The kernel said no.
    Denied {
        /// Where.
        directory: PathBuf,
        /// What it said.
        error: io::Error,
    },
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("there is no such controller here"),
            Self::Occupied { directory, strangers } => {
                write!(f, "{} also holds processes that are not ours: ", directory.display())?;
                for (index, pid) in strangers.iter().take(3).enumerate() {
                    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
                    let name = comm.as_deref().map_or("?", str::trim);
                    write!(f, "{}{name} (pid {pid})", if index > 0 { ", " } else { "" })?;
                }
                f.write_str(if strangers.len() > 3 { " and more" } else { "" })
            }
            Self::Denied { directory, error } => {
                write!(f, "{}: {error}", directory.join("cgroup.subtree_control").display())
            }
        }
    }
}

impl Place {
    fn new(top: &Path, controllers: Vec<Controller>) -> Self {
        Self {
            parent: top.to_owned(),
            controllers,
            lacks: Vec::new(),
            top: top.to_owned(),
            made: Vec::new(),
            enabled: Vec::new(),
            supervisor: None,
        }
    }

    fn settle(&mut self, parent: &Path) -> io::Result<()> {
        self.parent = parent.to_owned();
        files::make_path(&self.top, parent, &mut self.made)
    }

    /// Where we sit in a leaf that an earlier launcher of this dispatcher made,
    /// it is ours to clear away, with the controllers that it was made for.
    fn adopt_leaf(&mut self, own: Option<&Path>, wanted: &[Controller]) {
        let leaf = own.filter(|own| own.file_name().is_some_and(|name| name == supervisor::LEAF));
        let Some((leaf, above)) = leaf.and_then(|leaf| Some((leaf, leaf.parent()?))) else {
            return;
        };
        let on = |c: &&Controller| v2::lists(above, "cgroup.subtree_control", c.name());
        self.enabled.extend(wanted.iter().filter(on).map(|c| (above.to_owned(), *c)));
        self.supervisor = Some(leaf.to_owned());
    }

    /// Enables what can be; `false` where strangers prevent it.
    fn enable_all(&mut self, wanted: &[Controller], own_pids: &[Pid]) -> bool {
        let mut free = true;
        for controller in wanted {
            match self.enable(&self.parent.clone(), *controller, own_pids) {
                Ok(()) => self.controllers.push(*controller),
                Err(refused) => {
                    free &= !matches!(refused, Refused::Occupied { .. });
                    let reason = mend::not_enabled(*controller, &refused, &self.parent, &self.top);
                    self.lacks.push((*controller, reason));
                }
            }
        }
        free
    }

    /// Makes `controller` available to the children of `directory`.
    fn enable(
        &mut self,
        directory: &Path,
        controller: Controller,
        own_pids: &[Pid],
    ) -> Result<(), Refused> {
        let name = controller.name();
        if v2::lists(directory, "cgroup.subtree_control", name) {
            return Ok(());
        }
        if !v2::lists(directory, "cgroup.controllers", name) {
            let above = directory.parent().filter(|_| directory != self.top);
            self.enable(above.ok_or(Refused::Absent)?, controller, own_pids)?;
        }
        let on = format!("+{name}");
        let write = || files::write(directory, "cgroup.subtree_control", &on);
        if v2::is_true_root(directory) {
            write().map_err(|error| Refused::Denied { directory: directory.to_owned(), error })?;
        } else if let Some(leaf) = supervisor::make_room(directory, own_pids, write)? {
            self.supervisor = Some(leaf);
        }
        self.enabled.push((directory.to_owned(), controller));
        Ok(())
    }

    /// Enables `controller` for the runs in the instance's directory. From then on
    /// no other dispatcher's end can take it from above us; until then one may,
    /// as far as it was the one who enabled it: hence more than one attempt.
    pub(super) fn pass_on(
        &mut self,
        instance: &Path,
        controller: Controller,
        own_pids: &[Pid],
    ) -> Result<(), Refused> {
        let on = format!("+{}", controller.name());
        for attempt in 1.. {
            match files::write(instance, "cgroup.subtree_control", &on) {
                Ok(()) => break,
                Err(error) if attempt == ATTEMPTS_MAX => {
                    return Err(Refused::Denied { directory: instance.to_owned(), error });
                }
                Err(_) => self.enable(&self.parent.clone(), controller, own_pids)?,
            }
        }
        Ok(())
    }

    fn disable_all(&mut self) {
        for (directory, controller) in self.enabled.drain(..).rev() {
            // EBUSY: others below came to rely on it. Then it stays.
            let _stays_where_others_use_it = files::write(
                &directory,
                "cgroup.subtree_control",
                &format!("-{}", controller.name()),
            );
        }
        self.controllers.clear();
    }

    /// Leaves everything above the instance directory as it was found, from the
    /// inside out: controllers can't be disabled above where they are in use,
    /// nor processes moved back before.
    pub(super) fn undo(&mut self) {
        for directory in self.made.drain(..).rev() {
            let _stays_where_others_use_it = files::remove(&directory);
        }
        self.disable_all();
        if let Some(leaf) = self.supervisor.take() {
            supervisor::dissolve(&leaf, leaf.parent().unwrap_or(&self.top));
        }
    }
}
