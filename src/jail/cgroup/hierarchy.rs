//! The hierarchies in use: opening, making runs' cgroups, closing.

use std::{
    ffi::CString,
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use rustix::process::Pid;

use super::{
    Available, Cgroup, CgroupError, CgroupLimits, Control, Kind, Reason,
    instance::{self, Instance},
    layout::{Controller, Layout, Legacy, Mount},
    mend,
    place::{self, Place},
    run::Source,
    trial, v1, v2,
    values::Features,
};

/// Longest name of a run's cgroup or of an instance, in bytes.
const NAME_MAX: usize = 128;

/// Where and how runs' cgroups are made. Hold it for as long as there are runs.
#[derive(Debug)]
pub struct Hierarchy {
    /// v2 first: its `cgroup.kill` empties the others.
    trees: Vec<Tree>,
    available: Available,
    leftovers: Vec<String>,
    pub(super) features: Features,
    /// v1: what the parent's quotas leave, in thousandths of a processor.
    pub(super) cpu_ceiling: Option<u32>,
}

/// One hierarchy in use.
#[derive(Debug)]
struct Tree {
    kind: Kind,
    controllers: Vec<Controller>,
    instance: Instance,
    place: Place,
    top: PathBuf,
    /// Ours alone, where none is mounted for all.
    _detached: Option<OwnedFd>,
}

impl Hierarchy {
    /// Finds the hierarchies, makes `<parent>/dispatcher.<instance>/` in each that is
    /// needed, clears away what dead instances left, and tries which
    /// controls can be given.
    ///
    /// `parent` is `[server] cgroup_parent`: a path below each hierarchy's top, or
    /// empty. `own_pids` are this dispatcher's processes: where v2 demands that
    /// a cgroup with children holds no processes, these, and no others, are
    /// moved into a leaf below it. A host that gives nothing is not an error:
    /// [`Hierarchy::available`] says so.
    ///
    /// Children that outlive the caller must close what they inherit: a copy of
    /// the lock makes a dead instance look alive, so that nobody sweeps it.
    ///
    /// # Errors
    /// [`CgroupError::Parent`], [`CgroupError::ParentUnusable`] for a configured parent;
    /// [`CgroupError::Name`], [`CgroupError::InUse`] for the instance;
    /// [`CgroupError::Io`] when /proc cannot be read.
    pub fn open(parent: &str, instance: &str, own_pids: &[Pid]) -> Result<Self, CgroupError> {
        let read = |path: &str| {
            std::fs::read_to_string(path).map_err(|source| CgroupError::Io {
                what: "reading",
                path: path.into(),
                source,
            })
        };
        let layout = Layout::parse(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?);
        Self::open_in(&layout, parent, instance, own_pids)
    }

    /// The same for a known layout.
    pub(super) fn open_in(
        layout: &Layout,
        parent: &str,
        instance: &str,
        own_pids: &[Pid],
    ) -> Result<Self, CgroupError> {
        let configured = configured_parent(parent)?;
        check_name(instance)?;
        let mut opened = Self {
            trees: Vec::new(),
            available: Available::default(),
            leftovers: Vec::new(),
            features: Features::default(),
            cpu_ceiling: None,
        };
        let opening = Opening { configured: configured.as_deref(), instance, own_pids };
        let result = opened.open_unified(layout, &opening).and_then(|()| {
            layout.legacy.iter().try_for_each(|legacy| opened.open_legacy(legacy, &opening))
        });
        if let Err(error) = result {
            opened.close().ok();
            return Err(error);
        }
        if let (Some(_), true, Some(lack)) =
            (&configured, opened.trees.is_empty(), opened.available.lacks().next())
        {
            let (why, mend) = (lack.why.clone(), lack.mend.clone());
            return Err(CgroupError::ParentUnusable { parent: parent.to_owned(), why, mend });
        }
        opened.look_at_trees();
        let found = trial::run(&opened);
        for (control, reason) in found {
            opened.available.add(control, reason);
        }
        Ok(opened)
    }

    fn open_unified(&mut self, layout: &Layout, opening: &Opening<'_>) -> Result<(), CgroupError> {
        let wanted: Vec<_> = [Controller::Memory, Controller::Pids, Controller::Cpu]
            .into_iter()
            .filter(|controller| layout.legacy.iter().all(|l| !l.controllers.contains(controller)))
            .collect();
        let mut affected: Vec<_> = wanted.iter().flat_map(|c| controls_of(*c)).copied().collect();
        affected.push(Control::CgroupKill);
        if layout.legacy.iter().all(|l| !l.controllers.contains(&Controller::Cpuacct)) {
            affected.push(Control::CpuTime);
        }
        let (mount, detached) = match unified_mount(layout) {
            Ok(found) => found,
            Err(reason) => {
                for controller in wanted.iter().filter(|_| layout.unified.is_none()) {
                    self.lack(controls_of(*controller), &mend::nowhere(*controller));
                }
                self.lack(&affected, &reason);
                return Ok(());
            }
        };
        match place::unified(&mount, opening.configured, &wanted, opening.own_pids) {
            Ok(place) => {
                for (controller, reason) in &place.lacks {
                    self.lack(controls_of(*controller), reason);
                }
                let controllers = place.controllers.clone();
                self.add_tree(Kind::Unified, controllers, place, mount.point, detached, opening)
            }
            Err(reason) => {
                self.lack(&affected, &reason);
                Ok(())
            }
        }
    }

    fn open_legacy(&mut self, legacy: &Legacy, opening: &Opening<'_>) -> Result<(), CgroupError> {
        let mut controllers = legacy.controllers.clone();
        if self.trees.iter().any(|tree| tree.kind.is_unified()) {
            // A v2 cgroup counts CPU time by itself: one hierarchy less to join.
            controllers.retain(|controller| *controller != Controller::Cpuacct);
        }
        if controllers.is_empty() {
            return Ok(());
        }
        match place::legacy(&legacy.mount, opening.configured, &controllers) {
            Ok(place) => {
                let top = legacy.mount.point.clone();
                self.add_tree(Kind::Legacy, controllers, place, top, None, opening)
            }
            Err(reason) => {
                for controller in controllers {
                    self.lack(controls_of(controller), &reason);
                }
                Ok(())
            }
        }
    }

    fn add_tree(
        &mut self,
        kind: Kind,
        controllers: Vec<Controller>,
        mut place: Place,
        top: PathBuf,
        detached: Option<OwnedFd>,
        opening: &Opening<'_>,
    ) -> Result<(), CgroupError> {
        let instance = match Instance::claim(&place.parent, opening.instance) {
            Ok(instance) => instance,
            Err(error) => {
                let path = place.parent.join(format!("{}{}", instance::PREFIX, opening.instance));
                place.undo();
                if error.kind() == io::ErrorKind::WouldBlock {
                    return Err(CgroupError::InUse(path));
                }
                let controls = controllers.iter().flat_map(|c| controls_of(*c)).copied();
                let kill = kind.is_unified().then_some(Control::CgroupKill);
                let affected: Vec<_> = controls.chain(kill).collect();
                self.lack(&affected, &mend::unusable(&path, &error));
                return Ok(());
            }
        };
        for (path, error) in instance::sweep(&top) {
            self.leftovers.push(format!("{}: {error}", path.display()));
        }
        let mut tree = Tree { kind, controllers, instance, place, top, _detached: detached };
        if kind.is_unified() {
            for controller in tree.controllers.clone() {
                let directory = &tree.instance.directory;
                if let Err(refused) = tree.place.pass_on(directory, controller, opening.own_pids) {
                    let reason = mend::failed("enabling controllers", &refused);
                    self.lack(controls_of(controller), &reason);
                }
            }
        }
        self.trees.push(tree);
        Ok(())
    }

    fn look_at_trees(&mut self) {
        for tree in &self.trees {
            self.features.look(tree.kind, &tree.instance.directory);
            if !tree.kind.is_unified() && tree.controllers.contains(&Controller::Cpu) {
                self.cpu_ceiling = v1::cpu_ceiling(&tree.place.parent, &tree.top);
            }
        }
    }

    fn lack(&mut self, controls: &[Control], reason: &Reason) {
        for control in controls {
            self.available.add(*control, reason.clone());
        }
    }

    /// Which controls runs can have here, and why not the others.
    #[must_use]
    pub fn available(&self) -> &Available {
        &self.available
    }

    /// What dead instances left that could not be cleared away, for the log.
    #[must_use]
    pub fn leftovers(&self) -> &[String] {
        &self.leftovers
    }

    /// Makes the cgroup of one run, its limits in force before anyone is in it.
    ///
    /// A finite limit that cannot be set refuses the run, unless its control is in
    /// `best_effort`; [`Cgroup::enforced`] lists what is in force.
    ///
    /// # Errors
    /// [`CgroupError::Lacking`] as said, [`CgroupError::Name`], and
    /// [`CgroupError::Io`] when a directory cannot be made. Nothing stays behind then.
    pub fn create(
        &self,
        name: &str,
        limits: &CgroupLimits,
        best_effort: &[Control],
    ) -> Result<Cgroup, CgroupError> {
        check_name(name)?;
        let mut cgroup = Cgroup::make(self, name)?;
        match self.limit(&mut cgroup, limits, best_effort) {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                // Nobody was in it: it goes at once.
                cgroup.remove().ok();
                Err(error)
            }
        }
    }

    /// Sets the limits of one that is there already: what was set before is replaced.
    ///
    /// # Errors
    /// [`CgroupError::Lacking`], as for [`Hierarchy::create`].
    pub fn limit(
        &self,
        cgroup: &mut Cgroup,
        limits: &CgroupLimits,
        best_effort: &[Control],
    ) -> Result<(), CgroupError> {
        let refused = cgroup.set_limits(self, limits);
        match refused.into_iter().find(|(control, _)| !best_effort.contains(control)) {
            None => Ok(()),
            Some((control, reason)) => {
                Err(CgroupError::Lacking { control, why: reason.why, mend: reason.mend })
            }
        }
    }

    /// Ends whatever still runs, removes everything that [`Hierarchy::open`] made, and
    /// puts our own processes back where they were.
    ///
    /// # Errors
    /// [`CgroupError::LeftBehind`] with what could not be removed.
    pub fn close(mut self) -> Result<(), CgroupError> {
        let mut left = Vec::new();
        for tree in &mut self.trees {
            if let Err(error) = tree.instance.dissolve() {
                left.push(format!("{}: {error}", tree.instance.directory.display()));
            }
            tree.place.undo();
        }
        if left.is_empty() { Ok(()) } else { Err(CgroupError::LeftBehind(left.join(", "))) }
    }

    /// The directory that a run named `name` has in each hierarchy.
    pub(super) fn directories(&self, name: &str) -> Vec<Source> {
        let source = |tree: &Tree| Source {
            kind: tree.kind,
            path: tree.instance.directory.join(name),
            controllers: tree.controllers.clone(),
        };
        self.trees.iter().map(source).collect()
    }

    /// Why `control` is lacking, if that is known.
    pub(super) fn reason(&self, control: Control) -> Option<Reason> {
        let lack = self.available.lacking(control)?;
        Some(Reason { why: lack.why.clone(), mend: lack.mend.clone() })
    }
}

/// What stays the same for all trees.
struct Opening<'a> {
    configured: Option<&'a Path>,
    instance: &'a str,
    own_pids: &'a [Pid],
}

const fn controls_of(controller: Controller) -> &'static [Control] {
    match controller {
        // Not swap: where the host has none, a limit of 0 is kept without it.
        Controller::Memory => &[Control::CgroupMemory],
        Controller::Pids => &[Control::CgroupPids],
        Controller::Cpu => &[Control::CgroupCpu],
        Controller::Cpuacct => &[Control::CpuTime],
    }
}

/// The mounted v2 hierarchy, or one mounted for us alone where there is none or
/// only a read-only one.
fn unified_mount(layout: &Layout) -> Result<(Mount, Option<OwnedFd>), Reason> {
    if let Some(mount) = &layout.unified
        && !mount.read_only
        && mount.point.join("cgroup.controllers").exists()
    {
        return Ok((mount.clone(), None));
    }
    let (fd, point) = v2::detached_mount().map_err(|error| mend::no_unified(Some(&error)))?;
    let own = point.join(layout.unified_path.trim_start_matches('/'));
    let own = own.is_dir().then_some(own);
    Ok((Mount { point, own, read_only: false }, Some(fd)))
}

/// The configured parent as a relative path; nothing for an empty one.
fn configured_parent(text: &str) -> Result<Option<PathBuf>, CgroupError> {
    if text.is_empty() {
        return Ok(None);
    }
    let path = Path::new(text.trim_start_matches('/'));
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || CString::new(text).is_err() {
        return Err(CgroupError::Parent(text.to_owned()));
    }
    Ok(Some(path.to_owned()))
}

fn check_name(name: &str) -> Result<(), CgroupError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    // No ".", "..", and nothing that a tool takes for an option.
    let leading = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if leading && name.len() <= NAME_MAX && name.chars().all(fine) {
        Ok(())
    } else {
        Err(CgroupError::Name(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_plain_paths() {
        assert_eq!(configured_parent("").unwrap(), None);
        for (text, path) in [("/", ""), ("/a.slice/b", "a.slice/b"), ("a", "a")] {
            assert_eq!(configured_parent(text).unwrap(), Some(PathBuf::from(path)), "{text}");
        }
        for bad in ["..", "/a/../b", "./a", "a\0b"] {
            assert!(configured_parent(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_are_one_directory() {
        for good in ["0", "run-1", "a.b_c"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
