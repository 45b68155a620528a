//! Where the cgroup hierarchies are mounted and where in them we are: read from
//! `/proc/self/mountinfo` and `/proc/self/cgroup`, whose texts are parameters.

use std::path::{Path, PathBuf};

/// The resource controllers that runs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Controller {
    Memory,
    Pids,
    Cpu,
    /// v1 only: CPU time. On v2 every cgroup has it in `cpu.stat`.
    Cpuacct,
}

impl Controller {
    pub(super) const ALL: [Self; 4] = [Self::Memory, Self::Pids, Self::Cpu, Self::Cpuacct];

    /// Its name in mount options, /proc/self/cgroup and `cgroup.controllers`.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
            Self::Cpuacct => "cpuacct",
        }
    }
}

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// Where it is mounted.
    pub(super) point: PathBuf,
    /// Our own cgroup as seen through this mount; `None` where the mount does not show it.
    pub(super) own: Option<PathBuf>,
    /// Mounted read-only, as in most containers.
    pub(super) read_only: bool,
}

/// A v1 hierarchy and those of our controllers that are bound to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Legacy {
    pub(super) controllers: Vec<Controller>,
    pub(super) mount: Mount,
}

/// All hierarchies that matter here. Pure v2 has no `legacy`, pure v1 no
/// `unified`, hybrid both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) unified: Option<Mount>,
    pub(super) legacy: Vec<Legacy>,
    /// Our own v2 cgroup, whether or not a v2 hierarchy is mounted: below `/`.
    pub(super) unified_path: String,
}

impl Layout {
    /// Reads the two texts. Lines that make no sense are passed over: what is
    /// not understood is not there, and the controls that need it are lacking.
    pub(super) fn parse(mountinfo: &str, own_cgroups: &str) -> Self {
        let own = own_paths(own_cgroups);
        let path_of = |wanted: &str| {
            own.iter()
                .find(|(names, _)| names.split(',').any(|name| name == wanted))
                .map(|(_, path)| *path)
        };
        let mut layout =
            Self { unified_path: path_of("").unwrap_or("/").to_owned(), ..Self::default() };
        for line in mountinfo.lines() {
            let Some(entry) = Entry::parse(line) else { continue };
            match entry.kind {
                "cgroup2" => {
                    let mount = entry.mount(path_of(""));
                    if layout.unified.as_ref().is_none_or(|held| better(&mount, held)) {
                        layout.unified = Some(mount);
                    }
                }
                "cgroup" => layout.add_legacy(&entry, path_of),
                _ => {}
            }
        }
        layout
    }

    fn add_legacy<'a>(&mut self, entry: &Entry<'_>, path_of: impl Fn(&str) -> Option<&'a str>) {
        let controllers: Vec<_> = Controller::ALL
            .into_iter()
            .filter(|controller| entry.options.split(',').any(|word| word == controller.name()))
            .collect();
        let Some(first) = controllers.first() else { return };
        let mount = entry.mount(path_of(first.name()));
        match self.legacy.iter_mut().find(|held| held.controllers == controllers) {
            None => self.legacy.push(Legacy { controllers, mount }),
            Some(held) if better(&mount, &held.mount) => held.mount = mount,
            Some(_) => {}
        }
    }
}

/// The same hierarchy may be mounted several times: one that shows our own
/// cgroup and can be written to serves best; else the first.
fn better(new: &Mount, held: &Mount) -> bool {
    let rank = |mount: &Mount| (!mount.read_only, mount.own.is_some());
    rank(new) > rank(held)
}

/// `names → path` of each line of /proc/self/cgroup; the v2 line has no name.
fn own_paths(text: &str) -> Vec<(&str, &str)> {
    text.lines()
        .filter_map(|line| {
            let (_, rest) = line.split_once(':')?;
            rest.split_once(':')
        })
        .collect()
}

/// What is needed of one line of mountinfo, proc_pid_mountinfo(5).
struct Entry<'a> {
    root: String,
    point: String,
    read_only: bool,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Entry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<_> = left.split(' ').collect();
        let right: Vec<_> = right.split(' ').collect();
        let [_id, _parent, _device, root, point, flags, ..] = left[..] else { return None };
        let [kind, _source, options, ..] = right[..] else { return None };
        let read_only = [flags, options].iter().any(|list| list.split(',').any(|w| w == "ro"));
        Some(Self { root: unescape(root), point: unescape(point), read_only, kind, options })
    }

    fn mount(&self, own: Option<&str>) -> Mount {
        let point = PathBuf::from(&self.point);
        let own = own.and_then(|path| below(&self.root, path)).map(|path| {
            match path.trim_start_matches('/') {
                "" => point.clone(), // joining nothing would leave a slash at the end
                path => point.join(path),
            }
        });
        Mount { point, own, read_only: self.read_only }
    }
}

/// `path` seen from `root`, or nothing where it lies outside. A path with `..`
/// is outside our cgroup namespace.
fn below<'a>(root: &str, path: &'a str) -> Option<&'a str> {
    if Path::new(path).components().any(|part| part == std::path::Component::ParentDir) {
        return None;
    }
    let rest = path.strip_prefix(root.trim_end_matches('/'))?;
    (rest.is_empty() || rest.starts_with('/')).then_some(rest)
}

/// Undoes the octal escapes of space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        plain.push_str(before);
        match after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(char::from(byte));
                rest = &after[3..];
            }
            None => {
                plain.push('\\');
                rest = after;
            }
        }
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn legacy(layout: &Layout, controller: Controller) -> &Mount {
        &layout.legacy.iter().find(|l| l.controllers.contains(&controller)).unwrap().mount
    }

    #[test]
    fn pure_v2_in_a_systemd_service() {
        let layout = Layout::parse(
            "26 23 0:23 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
            "0::/system.slice/dispatcher.service\n",
        );
        assert!(layout.legacy.is_empty());
        let mount = layout.unified.unwrap();
        assert_eq!(mount.point, Path::new("/sys/fs/cgroup"));
        assert_eq!(
            mount.own.as_deref(),
            Some(Path::new("/sys/fs/cgroup/system.slice/dispatcher.service"))
        );
        assert!(!mount.read_only);
    }

    #[test]
    fn hybrid_with_controllers_apart() {
        let layout = Layout::parse(
            "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
             32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
             33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct\n\
             35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
             36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices\n\
             39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids\n\
             40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n",
            "9:name=systemd:/\n8:pids:/\n4:memory:/agent/x:y\n2:cpuacct:/\n1:cpu:/\n0::/\n",
        );
        assert_eq!(layout.legacy.len(), 4);
        assert_eq!(
            legacy(&layout, Controller::Memory).own.as_deref(),
            Some(Path::new("/sys/fs/cgroup/memory/agent/x:y"))
        );
        assert_eq!(
            legacy(&layout, Controller::Pids).own.as_deref(),
            Some(Path::new("/sys/fs/cgroup/pids"))
        );
        assert_eq!(layout.unified.unwrap().point, Path::new("/sys/fs/cgroup/unified"));
    }

    #[test]
    fn pure_v1_with_controllers_together() {
        let layout = Layout::parse(
            "30 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:12 - cgroup cgroup rw,cpu,cpuacct\n\
             31 25 0:28 / /sys/fs/cgroup/memory rw,nosuid shared:13 - cgroup cgroup rw,memory\n",
            "5:cpu,cpuacct:/user.slice\n4:memory:/user.slice\n",
        );
        assert!(layout.unified.is_none());
        assert_eq!(layout.unified_path, "/");
        assert_eq!(layout.legacy[0].controllers, [Controller::Cpu, Controller::Cpuacct]);
        assert_eq!(
            layout.legacy[0].mount.own.as_deref(),
            Some(Path::new("/sys/fs/cgroup/cpu,cpuacct/user.slice"))
        );
    }

    #[test]
    fn containers_see_their_own_part_read_only() {
        let layout = Layout::parse(
            "700 690 0:32 /docker/abc /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory\n\
             701 690 0:36 /docker/other /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n",
            "8:pids:/docker/abc\n4:memory:/docker/abc\n",
        );
        let memory = legacy(&layout, Controller::Memory);
        assert_eq!(memory.own.as_deref(), Some(Path::new("/sys/fs/cgroup/memory")));
        assert!(memory.read_only);
        assert_eq!(legacy(&layout, Controller::Pids).own, None, "another container's part");

        let outside = Layout::parse(
            "26 23 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n",
            "0::/../elsewhere\n",
        );
        assert_eq!(outside.unified.unwrap().own, None, "outside our cgroup namespace");
    }

    #[test]
    fn the_most_useful_of_several_mounts_wins() {
        let layout = Layout::parse(
            "26 23 0:23 / /ro ro - cgroup2 cgroup2 rw\n\
             27 23 0:23 /a /part rw - cgroup2 cgroup2 rw\n\
             28 23 0:23 / /with\\040space rw - cgroup2 cgroup2 rw\n\
             29 23 0:23 / /later rw - cgroup2 cgroup2 rw\n",
            "0::/b\n",
        );
        assert_eq!(layout.unified.unwrap().own.as_deref(), Some(Path::new("/with space/b")));
    }

    #[test]
    fn nonsense_is_no_hierarchy() {
        for text in ["", "x", "1 2 3 - cgroup2", " - ", "\\", "26 23 0:23 / /x rw - cgroup cgroup"]
        {
            let layout = Layout::parse(text, text);
            assert!(layout.unified.is_none() && layout.legacy.is_empty(), "{text}");
        }
        assert_eq!(unescape("a\\040b\\134c\\9"), "a b\\c\\9");
        assert_eq!(below("/a", "/ab"), None);
    }
}
