//! From the policy directory to what the server and the launcher work by.
//!
//! Either everything is right and there is a [`Loaded`], or there is every
//! fault of every file. Nothing is loaded in part.

use std::{collections::BTreeMap, path::Path};

use super::{
    Admission, Artifacts, Instances, Policy, PolicyFamily, PolicySet, Protocol, check,
    directory::{policy_name, policy_path, profile_path, read_policies, read_text},
    fault::{Fault, Place, tidy},
    named_or_nobody, profile,
    read::Source,
    resolve::{Effective, resolve},
    written::{PolicyFile, Resolved},
};
use crate::{
    jail::{
        decide,
        plan::{
            Allowed, CONTAINER_USER, Container, Filesystem, HostUser, Limits, Mode, SyscallPolicy,
            Template, TemplateId, TemplateSet,
        },
        seccomp::{deadly, filter::FilterError, profile::default_profile, syscalls},
    },
    names::Digest,
    sys,
};

/// The built-in profile's name.
const DEFAULT_PROFILE: &str = "default";

/// A policy directory that is right.
#[derive(Debug)]
pub struct Loaded {
    /// For the server.
    pub set: PolicySet,
    /// For the launcher.
    pub templates: TemplateSet,
    /// What is allowed but may not be meant.
    pub warnings: Vec<Fault>,
    /// Each policy with the places of its values, for `explain`.
    pub effective: BTreeMap<String, Effective>,
}

/// Looks a host user up by name; [`host_user`] but in tests.
pub type Users<'a> = &'a dyn Fn(&str) -> Option<HostUser>;

/// This host's user of that name.
#[must_use]
pub fn host_user(name: &str) -> Option<HostUser> {
    let (uid, gid) = sys::account(name)?;
    Some(HostUser { name: name.to_owned(), uid, gid })
}

/// Loads every policy of a directory.
///
/// # Errors
/// Everything that is wrong, in all files, sorted by place.
pub fn load(directory: &Path, users: Users<'_>) -> Result<Loaded, Vec<Fault>> {
    let mut faults = Vec::new();
    let sources = read_policies(directory, &mut faults);
    let mut files = BTreeMap::new();
    for (name, source) in sources {
        let file = source.and_then(|source| PolicyFile::read(&name, &source, &mut faults));
        files.insert(name, file);
    }
    let mut warnings = Vec::new();
    if files.is_empty() && faults.is_empty() {
        let message = "has no policy, so every call is refused";
        warnings.push(Fault::of_file(directory, message, "write NAMESPACE.toml or default.toml"));
    }
    let effective = resolve(&files, &mut faults);
    compile(directory, effective, users, faults, warnings)
}

/// Loads one policy, and beside it only the files that it extends.
///
/// # Errors
/// Everything that is wrong in those files.
pub fn load_file(path: &Path, users: Users<'_>) -> Result<Loaded, Vec<Fault>> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut faults = Vec::new();
    let name = String::from(policy_name(path).map_err(|fault| vec![fault])?);
    let mut files = BTreeMap::new();
    let mut next = Some((name.clone(), path.to_owned()));
    while let Some((name, path)) = next.take() {
        let text = read_text(&path).map_err(|fault| faults.push(fault)).ok();
        let file =
            text.and_then(|text| PolicyFile::read(&name, &Source::new(&path, text), &mut faults));
        let extends = file.as_ref().and_then(|file| file.extends.clone());
        files.insert(name, file);
        if let Some(extends) = extends {
            let parent = policy_path(directory, extends.value.as_str());
            // One that isn't there is told at the `extends` that names it.
            if !files.contains_key(extends.value.as_str()) && parent.symlink_metadata().is_ok() {
                next = Some((extends.value.into(), parent));
            }
        }
    }
    let mut effective = resolve(&files, &mut faults);
    effective.retain(|known, _| *known == name);
    compile(directory, effective, users, faults, Vec::new())
}

/// The built-in policy alone, as `default`: what an empty file comes to.
///
/// # Errors
/// None that its own test would not have found.
pub fn built_in(users: Users<'_>) -> Result<Loaded, Vec<Fault>> {
    let mut faults = Vec::new();
    let name = "default";
    let source = Source::new(Path::new("built-in"), String::new());
    let file = PolicyFile::read(name, &source, &mut faults);
    let effective = resolve(&[(name.to_owned(), file)].into(), &mut faults);
    compile(Path::new(""), effective, users, faults, Vec::new())
}

fn compile(
    directory: &Path,
    effective: BTreeMap<String, Effective>,
    users: Users<'_>,
    mut faults: Vec<Fault>,
    mut warnings: Vec<Fault>,
) -> Result<Loaded, Vec<Fault>> {
    let mut profiles = Profiles { directory, known: BTreeMap::new() };
    let has_containers = |policy: &Effective| check::may_run_in(&policy.resolved, Mode::Container);
    let with_containers = effective.iter().find(|(_, policy)| has_containers(policy));
    let with_containers = with_containers.map(|(name, _)| name.as_str());
    let mut policies = BTreeMap::new();
    let mut templates = Vec::new();
    for (name, policy) in &effective {
        faults.extend(check::faults(policy));
        warnings.extend(check::warnings(policy));
        let syscalls = profiles.syscalls(&policy.resolved, &mut faults);
        let user = direct_user(&policy.resolved, users, &mut faults);
        if user.as_ref().is_some_and(|user| user.uid == CONTAINER_USER)
            && let Some(other) = with_containers
        {
            warnings.push(shared_user_warning(&policy.resolved, other));
        }
        let build = |variant: usize, holds: &Resolved| {
            let variant = u32::try_from(variant).unwrap_or(u32::MAX);
            build(TemplateId { policy: name.clone(), variant }, holds, syscalls.clone())
        };
        let base = build(0, &policy.resolved);
        let overrides: Vec<(String, Policy)> = policy
            .overrides
            .iter()
            .enumerate()
            .map(|(index, special)| {
                (special.glob.value.to_string(), build(index + 1, &special.resolved))
            })
            .collect();
        let family = PolicyFamily { base, overrides };
        // Overrides have the same system calls, network and binds.
        let base = template(&family.base, user.clone());
        if let Err(error) = decide::check_filter(&base) {
            faults.push(filter_fault(&policy.resolved, &error));
        }
        let variants = family.overrides.iter().map(|(_, policy)| policy);
        templates.push(base);
        templates.extend(variants.map(|policy| template(policy, user.clone())));
        policies.insert(name.clone(), family);
    }
    if !faults.is_empty() {
        return Err(tidy(faults));
    }
    let unsigned = Digest::from_bytes([0; 32]);
    let mut set = PolicySet { digest: unsigned, policies };
    let containers = templates.iter().any(|template| template.modes.contains(&Mode::Container));
    let mut templates = TemplateSet { digest: unsigned, containers, templates };
    set.digest = digest_of(&(&set, &templates));
    templates.digest = set.digest;
    Ok(Loaded { set, templates, warnings: tidy(warnings), effective })
}

/// The digest of content that is always encoded the same way: struct fields in
/// their order, maps sorted by key.
fn digest_of(content: &impl serde::Serialize) -> Digest {
    let bytes = postcard::to_stdvec(content).expect("plain data can always be encoded");
    Digest::of(&bytes)
}

fn build(id: TemplateId, holds: &Resolved, syscalls: SyscallPolicy) -> Policy {
    let mut policy = Policy {
        // The digest is of the content alone: the same for the same rules by another name.
        id: TemplateId { policy: String::new(), variant: 0 },
        digest: Digest::from_bytes([0; 32]),
        mode: holds.general.mode.value,
        allow_modes: holds.general.allow_modes.value.values(),
        best_effort: holds.general.best_effort.value.values(),
        protocol: holds.call.protocol.value,
        argv: holds.call.argv.value,
        output: holds.call.output.value,
        limits: limits(holds),
        filesystem: Filesystem {
            root: holds.filesystem.root.value.clone(),
            tmp: holds.filesystem.tmp.value,
            tmp_exec: holds.filesystem.tmp_exec.value,
            binds: holds.filesystem.bind.value.values(),
        },
        network: holds.network.mode.value,
        syscalls,
        keep_capabilities: holds.capabilities.keep.value.values(),
        user: holds.identity.user.value.clone(),
        environment: environment(holds),
        environment_allow: holds.environment.allow.value.values(),
        services: holds.services.allow.value.values().iter().map(ToString::to_string).collect(),
        artifacts: artifacts(holds),
        admission: Admission {
            concurrency: holds.admission.concurrency.value,
            queue: holds.admission.queue.value,
            queue_timeout: holds.admission.queue_timeout.value,
            rate: holds.admission.rate.value,
        },
        container: Container {
            image: holds.container.image.value.clone(),
            pull: holds.container.pull.value,
            ahead: holds.container.ahead.value,
            runtime: holds.container.runtime.value.clone(),
        },
        instances: Instances {
            min: holds.instances.min.value,
            max: holds.instances.max.value,
            concurrency: holds.instances.concurrency.value,
            start_timeout: holds.instances.start_timeout.value,
            idle_timeout: holds.instances.idle_timeout.value,
            max_requests: holds.instances.max_requests.value,
        },
    };
    policy.digest = digest_of(&policy);
    policy.id = id;
    policy
}

fn limits(holds: &Resolved) -> Limits {
    let limits = &holds.limits;
    Limits {
        timeout: limits.timeout.value,
        cpu_time: limits.cpu_time.value,
        cpus: limits.cpus.value,
        memory: limits.memory.value,
        swap: limits.swap.value,
        pids: limits.pids.value,
        open_files: limits.open_files.value,
        file_size: limits.file_size.value,
        output: limits.output.value,
        stderr: limits.stderr.value,
        artifact_size: limits.artifact_size.value,
        input: limits.input.value,
    }
}

fn environment(holds: &Resolved) -> BTreeMap<String, String> {
    let set = &holds.environment.set.value;
    set.iter().map(|(name, at)| (name.clone(), at.value.clone())).collect()
}

fn artifacts(holds: &Resolved) -> Artifacts {
    let artifacts = &holds.artifacts;
    let interpreters = artifacts.interpreters.value.values();
    Artifacts {
        inline: artifacts.inline.value,
        uris: artifacts.uris.value.values(),
        digests: artifacts.digests.value.values(),
        // Read from UTF-8 text, so nothing is lost.
        interpreters: interpreters.iter().map(|path| path.display().to_string()).collect(),
    }
}

/// What those who run it are told.
fn template(policy: &Policy, user: Option<HostUser>) -> Template {
    let mut modes = vec![policy.mode];
    modes.extend(&policy.allow_modes);
    modes.sort();
    modes.dedup();
    Template {
        id: policy.id.clone(),
        modes,
        best_effort: policy.best_effort.clone(),
        limits: policy.limits.clone(),
        filesystem: policy.filesystem.clone(),
        network: policy.network,
        syscalls: policy.syscalls.clone(),
        keep_capabilities: policy.keep_capabilities.clone(),
        user,
        environment: policy.environment.clone(),
        environment_allow: policy.environment_allow.clone(),
        interpreters: policy.artifacts.interpreters.clone(),
        container: policy.container.clone(),
        listens: policy.protocol == Protocol::Grpc,
    }
}

/// The host user of direct mode, where the policy may run in it.
fn direct_user(holds: &Resolved, users: Users<'_>, faults: &mut Vec<Fault>) -> Option<HostUser> {
    if !check::may_run_in(holds, Mode::Direct) {
        return None;
    }
    let name = named_or_nobody(&holds.identity.user.value);
    let place = direct_place(holds);
    let mut fault = |message: String| {
        let help = "write [identity] user with an unprivileged user of this host";
        faults.push(Fault::new(place, message, help));
        None
    };
    match users(name) {
        None => fault(format!("identity.user is {name:?}, and this host has no such user")),
        Some(user) if user.uid == 0 => {
            fault(format!("identity.user is {name:?}, which is root by another name"))
        }
        Some(user) if user.gid == 0 => {
            fault(format!("identity.user is {name:?}, whose primary group is root's"))
        }
        Some(user) => Some(user),
    }
}

/// Where a policy says that it runs programs in direct mode, and as whom.
fn direct_place(holds: &Resolved) -> &Place {
    let named = &holds.identity.user.place;
    let places = [named, &holds.general.mode.place, &holds.general.allow_modes.place];
    places.into_iter().find(|place| place.is_written()).unwrap_or(named)
}

/// Docker gives every container's program this user, and to the kernel that is the host's.
fn shared_user_warning(holds: &Resolved, other: &str) -> Fault {
    let name = named_or_nobody(&holds.identity.user.value);
    let message = format!(
        "programs in direct mode run as {name}, and so do those in containers, which the policy \
         {other} allows: the former can read and change the latter, and what they answer"
    );
    let help = "write [identity] user with another unprivileged user of this host";
    Fault::new(direct_place(holds), message, help)
}

/// The profile alone was found to be possible when it was read.
fn filter_fault(holds: &Resolved, error: &FilterError) -> Fault {
    let seccomp = &holds.seccomp;
    let places = [&seccomp.profile.place, &seccomp.allow.place, &seccomp.deny.place];
    let place = places.into_iter().find(|place| place.is_written());
    let message = format!("the system calls of [seccomp] make no filter: {error}");
    let help = "simplify the profile, or the lists allow and deny that change it";
    Fault::new(place.unwrap_or(&seccomp.profile.place), message, help)
}

/// Seccomp profiles, each read once.
struct Profiles<'a> {
    directory: &'a Path,
    known: BTreeMap<String, Option<SyscallPolicy>>,
}

impl Profiles<'_> {
    /// The allowlist of a policy. Empty where its profile is faulty; then
    /// nothing is loaded anyway.
    fn syscalls(&mut self, holds: &Resolved, faults: &mut Vec<Fault>) -> SyscallPolicy {
        let profile = &holds.seccomp.profile;
        if !self.known.contains_key(&profile.value) {
            let read = self.read(&profile.value, holds, faults);
            self.known.insert(profile.value.clone(), read);
        }
        let mut policy = self.known.get(&profile.value).cloned().flatten().unwrap_or_default();
        let number = |name: &String| syscalls::number(name);
        for call in holds.seccomp.allow.value.values().iter().filter_map(number) {
            // The filter's own rules lie over the profile: `check` warns of these.
            if !deadly::is_deadly(call) && Some(call) != syscalls::number("clone3") {
                policy.allowed.insert(call, Allowed::Always);
            }
        }
        for call in holds.seccomp.deny.value.values().iter().filter_map(number) {
            policy.allowed.remove(&call);
        }
        policy
    }

    fn read(&self, name: &str, holds: &Resolved, faults: &mut Vec<Fault>) -> Option<SyscallPolicy> {
        if name == DEFAULT_PROFILE {
            return Some(default_profile());
        }
        let path = profile_path(self.directory, name);
        if path.symlink_metadata().is_err() {
            let message =
                format!("seccomp.profile is {name:?}, and there is no seccomp/{name}.json");
            let help = "write \"default\", or put the profile there";
            faults.push(Fault::new(&holds.seccomp.profile.place, message, help));
            return None;
        }
        let text = read_text(&path).map_err(|fault| faults.push(fault)).ok()?;
        let wrong = match profile::parse(&text) {
            Ok(policy) => return Some(policy),
            Err(wrong) => wrong,
        };
        faults.extend(wrong.into_iter().map(|what| profile_fault(&path, what)));
        None
    }
}

/// A fault of a profile. Where the text says the place as JSON's parser does
/// (`… at line 3 column 7`), it becomes the fault's own.
fn profile_fault(path: &Path, what: String) -> Fault {
    let place = what.rsplit_once(" at line ").and_then(|(what, place)| {
        let (line, column) = place.split_once(" column ")?;
        let (line, column): (u32, u32) = (line.parse().ok()?, column.parse().ok()?);
        // It counts columns from 0 where a line has just ended.
        let place = Place::File { file: path.into(), line: line.max(1), column: column.max(1) };
        Some((what.to_owned(), place))
    });
    let (what, place) = place.unwrap_or_else(|| (what, Place::start_of(path)));
    Fault::new(&place, what, "write the OCI/Docker or seccompiler form, as an allowlist")
}
