//! A policy file as it is written: every key, what it is for, and its kind.
//!
//! This is the one place to add a key. Reading, inheriting, `explain` and the
//! JSON Schema follow from it; `compile` says what becomes of the value, and
//! `builtin.toml` what holds where nobody gives it.

use std::sync::LazyLock;

use super::{
    Argv, OutputFormat, Protocol,
    fault::{At, Fault, Place},
    glob::Glob,
    kinds::{Flag, Kind as _, List, Text as _, Word},
    quantities::{Bytes, Count, Cpus, Limited, PerSecond, Time},
    read::{Source, Table},
    tables::tables,
    values::*,
};
use crate::{
    jail::plan::{Mode, Network},
    names::Namespace,
};

/// The built-in defaults, as a policy file.
pub const BUILT_IN: &str = include_str!("builtin.toml");

/// Most `[service."…"]` tables of one file.
const OVERRIDES_MAX: usize = 256;

type Size = Limited<Bytes<0>>;
type Duration = Limited<Time<1>>;
type Few<const MIN: u64> = Count<u32, MIN, 1_000_000>;

tables! {
    /// What a call is run in, and how far a request may differ.
    general [""] {
        /// The sandbox that calls run in: "jail", "container" or "direct".
        mode: Word<Mode>,
        /// Controls (the names that reports list in "enforced") whose absence on
        /// a host doesn't refuse the call; all others must be in force.
        best_effort: List<ControlWord>,
        /// The other modes that a request may ask for.
        allow_modes: List<Word<Mode>>,
    }

    /// How the program takes its call; can be overridden for a service.
    call [""] {
        /// How the program takes its call: "exec" starts it once per call, "grpc" keeps a gRPC server.
        protocol: Word<Protocol>,
        /// How argv is made: "collector" puts namespace, service and method first, "plain" doesn't.
        argv: Word<Argv>,
        /// What becomes of stdout: "status", "bytes" or "any".
        output: Word<OutputFormat>,
    }

    /// What one call may use; can be overridden for a service.
    limits ["limits"] {
        /// Wall clock of one call, time in the queue excluded.
        timeout: Duration,
        /// User and system time of the whole process tree.
        cpu_time: Duration,
        /// Share of the processors' time: 1.5 is one and a half processors.
        cpus: Limited<Cpus>,
        /// Memory of the whole process tree, at least 4MiB.
        memory: Limited<Bytes<{ 4 << 20 }>>,
        /// Swap on top of memory.
        swap: Size,
        /// Processes and threads at once.
        pids: Limited<Count<u64, 1, 4_194_303>>,
        /// File descriptors of one process.
        open_files: Limited<Count<u64, 4, 1_048_576>>,
        /// Size of one file that the program writes.
        file_size: Size,
        /// Standard output; more ends the run.
        output: Size,
        /// How much of the end of standard error is kept.
        stderr: Size,
        /// Size of the executable.
        artifact_size: Limited<Bytes<1>>,
        /// Size of the input message.
        input: Size,
    }

    /// What the program sees as its file system.
    filesystem ["filesystem"] {
        /// "empty" for static executables, "host" for the host's programs
        /// read-only, or the absolute path of a directory, read-only.
        root: RootDirectory,
        /// Size of a private /tmp; "none" for none.
        tmp: Tmp,
        /// Whether /tmp may hold executables.
        tmp_exec: Flag,
        /// Directories and files of the host that are shown inside.
        bind: List<BindEntry>,
    }

    /// What the program can talk to.
    network ["network"] {
        /// "none", "loopback" (a private one) or "host".
        mode: Word<Network>,
    }

    /// Which system calls the program may make.
    seccomp ["seccomp"] {
        /// "default", or NAME for the file seccomp/NAME.json beside the policies.
        profile: ProfileName,
        /// System calls allowed on top of the profile.
        allow: List<Syscall>,
        /// System calls that the profile loses; stronger than allow.
        deny: List<Syscall>,
    }

    /// What the program keeps of root's powers within its own user namespace.
    capabilities ["capabilities"] {
        /// Names such as "CAP_NET_RAW".
        keep: List<Capability>,
    }

    /// Who the program runs as.
    identity ["identity"] {
        /// In direct mode, a host user other than root; empty for nobody. A jail
        /// has uid 65534 inside and a host uid of its own outside.
        user: UserName,
    }

    /// The program's environment.
    environment ["environment"] {
        /// Variables and their values.
        set: Variables,
        /// Names that a request may set.
        allow: List<VariableName>,
    }

    /// Which services and methods may be called.
    services ["services"] {
        /// "SERVICE/METHOD" globs; "*" alone for all.
        allow: List<CallGlob>,
    }

    /// Which executables may run; can be overridden for a service.
    artifacts ["artifacts"] {
        /// Whether a request may bring the executable's bytes.
        inline: Flag,
        /// What a request's service_uri may begin with.
        uris: List<UriPrefix>,
        /// When not empty, only executables with these digests.
        digests: List<ArtifactDigest>,
        /// Interpreters for executables that begin with "#!".
        interpreters: List<AbsolutePath>,
    }

    /// How many calls run at once, and how long others wait.
    admission ["admission"] {
        /// Calls at once.
        concurrency: Limited<Few<1>>,
        /// Calls that may wait.
        queue: Limited<Few<0>>,
        /// How long they may wait.
        queue_timeout: Limited<Time<0>>,
        /// Calls begun per second, minute or hour, such as "100/s".
        rate: Limited<PerSecond>,
    }

    /// What container mode runs in.
    container ["container"] {
        /// Image; empty for one that the dispatcher makes by itself.
        image: ImageName,
        /// Whether an image that Docker doesn't hold is pulled from its registry.
        pull: Flag,
        /// Containers of each namespace that wait for its next calls.
        ahead: Count<u32, 0, 64>,
        /// OCI runtime, such as "runsc"; empty for Docker's default.
        runtime: RuntimeName,
    }

    /// Instances of a gRPC server (protocol "grpc"); can be overridden for a service.
    instances ["instances"] {
        /// Kept ready.
        min: Few<0>,
        /// At most this many.
        max: Few<1>,
        /// Calls at once in one instance.
        concurrency: Few<1>,
        /// How long one may take to answer first.
        start_timeout: Duration,
        /// How long an idle one is kept.
        idle_timeout: Duration,
        /// Calls after which one is replaced.
        max_requests: Limited<Count<u64, 1, { i64::MAX as u64 }>>,
    }
}

/// One policy file, as it is written.
#[derive(Clone, Debug)]
pub struct PolicyFile {
    /// The file's name without `.toml`.
    pub name: String,
    /// Its first character: where faults of the file as a whole are shown.
    pub start: Place,
    /// The policy that it starts from.
    pub extends: Option<At<Namespace>>,
    /// Its tables.
    pub tables: Tables,
    /// Its `[service."…"]` tables, in the file's order.
    pub overrides: Vec<WrittenOverride>,
}

/// A `[service."…"]` table.
#[derive(Clone, Debug)]
pub struct WrittenOverride {
    /// What it is about.
    pub glob: At<Glob>,
    /// Its top-level keys.
    pub call: call::Written,
    /// `limits`
    pub limits: limits::Written,
    /// `artifacts`
    pub artifacts: artifacts::Written,
    /// `instances`
    pub instances: instances::Written,
}

impl PolicyFile {
    /// Reads the policy `name` from its file's text.
    pub fn read(name: &str, source: &Source, faults: &mut Vec<Fault>) -> Option<Self> {
        source.read(faults, |table, faults| {
            table.keys_elsewhere(homes());
            let extends = table.take("extends").and_then(|item| {
                let value = PolicyName::read(&item, faults)?;
                Some(At { value, place: item.place() })
            });
            let tables = Tables::read(table, faults);
            let overrides = table.section("service", faults, read_overrides).unwrap_or_default();
            let start = Place::start_of(source.file());
            Self { name: name.to_owned(), start, extends, tables, overrides }
        })
    }
}

/// What holds where no file says anything.
///
/// # Panics
/// Never: a test proves that `builtin.toml` is complete.
#[must_use]
pub fn built_in() -> &'static Resolved {
    static RESOLVED: LazyLock<Resolved> = LazyLock::new(|| {
        let mut faults = Vec::new();
        let file = PolicyFile::read("built-in", &Source::built_in(BUILT_IN), &mut faults);
        file.filter(|_| faults.is_empty())
            .and_then(|file| file.tables.complete())
            .expect("builtin.toml gives every key")
    });
    &RESOLVED
}

fn read_overrides(table: &mut Table<'_>, faults: &mut Vec<Fault>) -> Vec<WrittenOverride> {
    let mut overrides: Vec<WrittenOverride> = Vec::new();
    for (index, (key, item)) in table.take_all().into_iter().enumerate() {
        if index == OVERRIDES_MAX {
            let message = format!("more than {OVERRIDES_MAX} [service] tables");
            faults.push(Fault::new(&key.place, message, "cover several methods by one glob"));
            break;
        }
        let glob = CallGlob::parse(key.value).map_err(|wrong| {
            faults.push(Fault::new(&key.place, format!("service {}", wrong.message), wrong.help));
        });
        let contents = item.table(faults, |table, faults| {
            table.keys_elsewhere(homes());
            (
                call::Written::read(table, faults),
                table.section("limits", faults, limits::Written::read).unwrap_or_default(),
                table.section("artifacts", faults, artifacts::Written::read).unwrap_or_default(),
                table.section("instances", faults, instances::Written::read).unwrap_or_default(),
            )
        });
        let (Ok(glob), Some((call, limits, artifacts, instances))) = (glob, contents) else {
            continue;
        };
        if let Some(same) = overrides.iter().find(|other| other.glob.value == glob) {
            let message = format!("[service.{:?}] means the same as one before", key.value);
            let help = format!("put its keys into the one at {}", same.glob.place);
            faults.push(Fault::new(&key.place, message, help));
            continue;
        }
        let glob = At { value: glob, place: key.place };
        overrides.push(WrittenOverride { glob, call, limits, artifacts, instances });
    }
    overrides
}

/// Which table each key belongs into, for help with one that stands elsewhere.
fn homes() -> Vec<(&'static str, &'static str)> {
    let keys = describe().into_iter().map(|key| (key.key, key.table));
    keys.chain([("extends", ""), ("service", "")]).collect()
}
