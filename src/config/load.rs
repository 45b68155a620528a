//! Flags over `DISPATCHER_*` variables over the file over what is built in.
//!
//! | variable | flag | key |
//! | --- | --- | --- |
//! | `DISPATCHER_CONFIG` | `--config` | the file itself |
//! | `DISPATCHER_LISTEN` (several with commas between) | `--listen` | `server.listen` |
//! | `DISPATCHER_POLICIES` | `--policies` | `policies.dir` |
//! | `DISPATCHER_STATE` | `--state` | `state.dir` |
//! | `DISPATCHER_DRAIN_TIMEOUT` | `--drain-timeout` | `server.drain_timeout` |
//!
//! A variable that is empty counts as not set.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use super::{
    Config, ListenAddress, uids,
    written::{self, Address, Resolved, Tables},
};
use crate::{
    policy::{
        directory::read_text,
        fault::{At, Fault, Place, quoted, tidy},
        kinds::{Items, Text as _},
        read::Source,
    },
    units::parse_duration,
};

/// The server's own file, where none is named.
pub const SYSTEM_FILE: &str = "/etc/dispatcher/dispatcher.toml";

/// Most addresses to listen on; each is a descriptor passed between processes.
const LISTEN_MAX: usize = 16;

/// What the command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigOverrides {
    /// `--listen`, once or more.
    pub listen: Option<Vec<String>>,
    /// `--policies`
    pub policies: Option<PathBuf>,
    /// `--state`
    pub state: Option<PathBuf>,
    /// `--drain-timeout`
    pub drain_timeout: Option<String>,
    /// `--insecure`
    pub insecure: Option<bool>,
}

/// What the settings depend on besides file and flags.
pub struct Surroundings<'a> {
    /// The environment.
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
    /// Whether this process is root.
    pub root: bool,
    /// The host's name.
    pub host_name: String,
    /// The text of `/etc/subuid`; empty where there is none.
    pub subuid: String,
}

impl Surroundings<'_> {
    /// Those of this process.
    #[must_use]
    pub fn current() -> Self {
        let host_name = nix::unistd::gethostname().unwrap_or_default();
        Self {
            variable: &|name| std::env::var_os(name),
            root: nix::unistd::geteuid().is_root(),
            host_name: host_name.to_string_lossy().into_owned(),
            subuid: std::fs::read_to_string("/etc/subuid").unwrap_or_default(),
        }
    }

    fn set(&self, name: &str) -> Option<OsString> {
        (self.variable)(name).filter(|value| !value.is_empty())
    }

    /// A directory of the user's: `$VARIABLE`, or `below` in the home directory.
    fn home(&self, variable: &str, below: &str) -> Option<PathBuf> {
        let given = self.set(variable).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = || Some(Path::new(&self.set("HOME")?).join(below));
        given.or_else(home).filter(|path| path.is_absolute() && path.to_str().is_some())
    }
}

/// The settings, and where they come from.
#[derive(Clone, Debug)]
pub struct LoadedConfig {
    /// Complete and checked.
    pub config: Config,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// Each setting as `table.key`, its value, and its place: for the log.
    pub settings: Vec<(String, String, Place)>,
}

/// Loads the settings. `file` is what `--config` names.
///
/// # Errors
/// Everything that is wrong with them.
pub fn load(
    file: Option<&Path>,
    overrides: &ConfigOverrides,
    surroundings: &Surroundings<'_>,
) -> Result<LoadedConfig, Vec<Fault>> {
    let mut faults = Vec::new();
    let mut holds = defaults(surroundings);
    let file = find_file(file, surroundings);
    if let Some(tables) = file.as_ref().and_then(|path| read_file(path, &mut faults)) {
        holds.overlay(&tables);
    }
    apply_variables(&mut holds, surroundings, &mut faults);
    apply_flags(&mut holds, overrides, &mut faults);
    let insecure = overrides.insecure.unwrap_or(false);
    check(&holds, insecure, surroundings, &mut faults);
    if !faults.is_empty() {
        return Err(tidy(faults));
    }
    let settings = holds
        .entries()
        .into_iter()
        .map(|entry| {
            (format!("{}.{}", entry.table, entry.key), entry.shown.inline(), entry.place.clone())
        })
        .collect();
    Ok(LoadedConfig { config: decide(holds, insecure, surroundings), file, settings })
}

/// Reads one file and checks it by itself, for `config check`.
///
/// # Errors
/// Everything that is wrong with it.
pub fn check_file(path: &Path, surroundings: &Surroundings<'_>) -> Result<(), Vec<Fault>> {
    let mut faults = Vec::new();
    let mut holds = defaults(surroundings);
    if let Some(tables) = read_file(path, &mut faults) {
        holds.overlay(&tables);
    }
    // Whether it may listen beyond loopback is for the command line to say.
    check(&holds, true, surroundings, &mut faults);
    if faults.is_empty() { Ok(()) } else { Err(tidy(faults)) }
}

/// What a file makes reachable from beyond this host: fine with `--insecure` only.
#[must_use]
pub fn exposed(path: &Path) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut holds = written::built_in();
    if let Some(tables) = read_file(path, &mut faults) {
        holds.overlay(&tables);
    }
    faults.clear();
    refuse_exposure(&holds, &mut faults);
    faults
}

/// The file to read: named by flag or variable, else the user's, else the system's.
#[must_use]
pub fn find_file(named: Option<&Path>, surroundings: &Surroundings<'_>) -> Option<PathBuf> {
    if let Some(path) = named {
        return Some(path.to_owned());
    }
    if let Some(path) = surroundings.set("DISPATCHER_CONFIG") {
        return Some(path.into());
    }
    let own = || surroundings.home("XDG_CONFIG_HOME", ".config");
    let own =
        own().filter(|_| !surroundings.root).map(|home| home.join("dispatcher/dispatcher.toml"));
    own.into_iter().chain([PathBuf::from(SYSTEM_FILE)]).find(|path| path.exists())
}

fn defaults(surroundings: &Surroundings<'_>) -> Resolved {
    let mut holds = written::built_in();
    if !surroundings.root {
        if let Some(home) = surroundings.home("XDG_CONFIG_HOME", ".config") {
            holds.policies.dir.value = home.join("dispatcher/policies");
        }
        if let Some(home) = surroundings.home("XDG_STATE_HOME", ".local/state") {
            holds.state.dir.value = home.join("dispatcher");
        }
        if let Some(home) = surroundings.home("XDG_CACHE_HOME", ".cache") {
            holds.docker.directory.value = home.join("dispatcher");
        }
    }
    let given = [
        ("STATE_DIRECTORY", &mut holds.state.dir),
        ("CACHE_DIRECTORY", &mut holds.docker.directory),
    ];
    for (variable, directory) in given {
        // systemd lists several with colons between; the first is the one named first.
        let text = surroundings.set(variable).and_then(|text| text.into_string().ok());
        let first = text.as_deref().and_then(|text| text.split(':').next());
        if let Some(value) = first.filter(|text| text.starts_with('/')) {
            *directory = At { value: value.into(), place: Place::Variable(variable) };
        }
    }
    holds
}

fn read_file(path: &Path, faults: &mut Vec<Fault>) -> Option<Tables> {
    // Unlike a policy, it may be a link: it is the administrator who names it.
    let real = path.canonicalize().map_err(|error| {
        let message = format!("can't be read: {error}");
        faults.push(Fault::of_file(path, message, "check that it is there and readable"));
    });
    let text = read_text(&real.ok()?).map_err(|mut fault| {
        fault.place = Place::start_of(path);
        faults.push(fault);
    });
    written::read(&Source::new(path, text.ok()?), faults)
}

fn apply_variables(holds: &mut Resolved, surroundings: &Surroundings<'_>, faults: &mut Vec<Fault>) {
    let mut text = |name: &'static str| {
        let value = surroundings.set(name)?.into_string();
        let fault = |_| {
            faults.push(Fault::new(
                &Place::Variable(name),
                "is not UTF-8 text",
                "write it in UTF-8",
            ));
        };
        value.map_err(fault).ok().map(|value| (value, Place::Variable(name)))
    };
    let listen = text("DISPATCHER_LISTEN");
    let policies = text("DISPATCHER_POLICIES");
    let state = text("DISPATCHER_STATE");
    let drain_timeout = text("DISPATCHER_DRAIN_TIMEOUT");
    if let Some((text, place)) = listen {
        let addresses = text.split([',', ' ']).filter(|part| !part.is_empty());
        set_listen(holds, addresses, place, faults);
    }
    if let Some((path, place)) = policies {
        holds.policies.dir = directory(Path::new(&path), place, faults);
    }
    if let Some((path, place)) = state {
        holds.state.dir = directory(Path::new(&path), place, faults);
    }
    if let Some((text, place)) = drain_timeout {
        set_drain_timeout(holds, &text, place, faults);
    }
}

fn apply_flags(holds: &mut Resolved, overrides: &ConfigOverrides, faults: &mut Vec<Fault>) {
    if let Some(addresses) = &overrides.listen {
        let addresses = addresses.iter().map(String::as_str);
        set_listen(holds, addresses, Place::Flag("--listen"), faults);
    }
    if let Some(path) = &overrides.policies {
        holds.policies.dir = directory(path, Place::Flag("--policies"), faults);
    }
    if let Some(path) = &overrides.state {
        holds.state.dir = directory(path, Place::Flag("--state"), faults);
    }
    if let Some(text) = &overrides.drain_timeout {
        set_drain_timeout(holds, text, Place::Flag("--drain-timeout"), faults);
    }
}

fn set_listen<'a>(
    holds: &mut Resolved,
    addresses: impl Iterator<Item = &'a str>,
    place: Place,
    faults: &mut Vec<Fault>,
) {
    let mut items = Vec::new();
    for text in addresses {
        match Address::parse(text) {
            Ok(value) => items.push(At { value, place: place.clone() }),
            Err(wrong) => faults.push(Fault::new(&place, wrong.message, wrong.help)),
        }
    }
    holds.server.faulty.retain(|key| *key != "listen");
    holds.server.listen = At { value: Items { items, inherited_at: None }, place };
}

fn set_drain_timeout(holds: &mut Resolved, text: &str, place: Place, faults: &mut Vec<Fault>) {
    match parse_duration(text) {
        Ok(value) => holds.server.drain_timeout = At { value, place },
        Err(_) => {
            let message = format!("is {}, which is not a duration", quoted(text));
            faults.push(Fault::new(&place, message, "write a number with a unit, such as \"45s\""));
        }
    }
}

/// A directory named by a person: relative to where they are.
fn directory(path: &Path, place: Place, faults: &mut Vec<Fault>) -> At<PathBuf> {
    let value = std::path::absolute(path).unwrap_or_else(|error| {
        let message =
            format!("is {}, which can't be used: {error}", quoted(&path.to_string_lossy()));
        faults.push(Fault::new(&place, message, "write an absolute path"));
        path.to_owned()
    });
    At { value, place }
}

fn check(
    holds: &Resolved,
    insecure: bool,
    surroundings: &Surroundings<'_>,
    faults: &mut Vec<Fault>,
) {
    let listen = &holds.server.listen;
    let addresses = &listen.value.items;
    if addresses.is_empty() || addresses.len() > LISTEN_MAX {
        let message = format!("server.listen has {} addresses", addresses.len());
        faults.push(Fault::new(&listen.place, message, format!("write 1 to {LISTEN_MAX}")));
    }
    let health = &holds.server.health_listen;
    let mut seen: Vec<&ListenAddress> = Vec::new();
    let all = addresses.iter().map(|at| (&at.value, &at.place));
    for (address, place) in all.chain(health.value.as_ref().map(|value| (value, &health.place))) {
        // Port 0 is another port each time.
        let any_port = matches!(address, ListenAddress::Tcp { port: 0, .. });
        if seen.contains(&address) && !any_port {
            let message = format!("server.listen has \"{address}\" twice");
            faults.push(Fault::new(place, message, "leave one of them out"));
        }
        seen.push(address);
    }
    if !insecure {
        refuse_exposure(holds, faults);
    }
    check_uids(holds, surroundings, faults);
}

fn refuse_exposure(holds: &Resolved, faults: &mut Vec<Fault>) {
    let health = &holds.server.health_listen;
    let health = health.value.as_ref().map(|value| ("health_listen", value, &health.place));
    let listen = holds.server.listen.value.items.iter();
    for (key, address, place) in listen.map(|at| ("listen", &at.value, &at.place)).chain(health) {
        if !address.is_local() {
            let message =
                format!("server.{key} has \"{address}\", which others can reach, without TLS");
            let help = "write a loopback address or unix:PATH, or start with --insecure";
            faults.push(Fault::new(place, message, help));
        }
    }
}

fn check_uids(holds: &Resolved, surroundings: &Surroundings<'_>, faults: &mut Vec<Fault>) {
    // An ordinary user has no other uids to give.
    if !surroundings.root {
        return;
    }
    let range = &holds.server.uid_range;
    if let Some(line) = uids::taken(range.value, &surroundings.subuid, &["root", "0"]) {
        let (first, last) = range.value;
        let message = format!(
            "server.uid_range is \"{first}-{last}\", of which /etc/subuid gives {line:?} away"
        );
        faults.push(Fault::new(&range.place, message, "write a range that nobody has"));
    }
}

fn decide(holds: Resolved, insecure: bool, surroundings: &Surroundings<'_>) -> Config {
    let server = holds.server;
    let id = server.id.value;
    Config {
        id: if id.is_empty() { surroundings.host_name.clone() } else { id },
        listen: server.listen.value.values(),
        health_listen: server.health_listen.value,
        socket_mode: server.socket_mode.value,
        socket_group: server.socket_group.value,
        drain_timeout: server.drain_timeout.value,
        concurrency: server.concurrency.value,
        memory: server.memory.value,
        inflight_bytes: server.inflight_bytes.value,
        max_connections: server.max_connections.value,
        cgroup_parent: server.cgroup_parent.value,
        uid_range: server.uid_range.value,
        policies: holds.policies.dir.value,
        reload: holds.policies.reload.value,
        state: holds.state.dir.value,
        artifact_cache: holds.artifacts.cache.value,
        docker_socket: holds.docker.socket.value,
        docker_directory: holds.docker.directory.value,
        insecure,
    }
}
