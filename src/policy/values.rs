//! The kinds of values that only policies have.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
    str::FromStr as _,
};

use serde_json::{Value as Json, json};

use super::{
    Argv, OutputFormat, Protocol,
    fault::{At, Fault},
    glob::Glob,
    kinds::{Bytes, Flag, Kind, Limited, Shown, Text, Words, Wrong, toml_string, unknown},
    read::{Item, Table},
};
use crate::{
    jail::{
        plan::{Bind, Control, Mode, Network, Root},
        seccomp::{deadly, syscalls},
    },
    names::{Digest, Namespace},
    units::Limit,
};

impl Words for Mode {
    const WORDS: &'static [(&'static str, Self)] =
        &[("jail", Self::Jail), ("container", Self::Container), ("direct", Self::Direct)];
}

impl Words for Protocol {
    const WORDS: &'static [(&'static str, Self)] = &[("exec", Self::Exec), ("grpc", Self::Grpc)];
}

impl Words for Argv {
    const WORDS: &'static [(&'static str, Self)] =
        &[("collector", Self::Collector), ("plain", Self::Plain)];
}

impl Words for OutputFormat {
    const WORDS: &'static [(&'static str, Self)] =
        &[("status", Self::Status), ("bytes", Self::Bytes), ("any", Self::Any)];
}

impl Words for Network {
    const WORDS: &'static [(&'static str, Self)] =
        &[("none", Self::None), ("loopback", Self::Loopback), ("host", Self::Host)];
}

/// A control, by its word; `landlock` of any version.
pub struct ControlWord;

impl Text for ControlWord {
    type Value = Control;
    const WHAT: &'static str = "the name of a control";
    const HELP: &'static str =
        "write a word that reports use in \"enforced\", such as \"landlock\"";

    fn parse(text: &str) -> Result<Control, Wrong> {
        Control::from_str(text).map_err(|()| {
            let versioned = text.starts_with("landlock.");
            let like = if versioned { "landlock" } else { text };
            let mut wrong = unknown(like, "a control", Control::ALL.map(Control::word));
            wrong.message = format!("has {text:?}, which is not a control");
            wrong
        })
    }

    fn show(value: &Control) -> String {
        value.word().to_owned()
    }
}

/// The name of another policy.
pub struct PolicyName;

impl Text for PolicyName {
    type Value = Namespace;
    const WHAT: &'static str = "the name of a policy";
    const HELP: &'static str = "write the name of a file in the same directory, without .toml";

    fn parse(text: &str) -> Result<Namespace, Wrong> {
        text.parse().map_err(|error| Wrong::new(format!("{error}"), Self::HELP))
    }

    fn show(value: &Namespace) -> String {
        value.to_string()
    }
}

/// Size of /tmp, or `"none"`.
pub struct Tmp;

// tmpfs takes `size=0` for "no limit", hence the page at least.
type TmpSize = Limited<Bytes<4096>>;

impl Kind for Tmp {
    type Value = Option<Limit<u64>>;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<Self::Value> {
        if item.text() == Some("none") { Some(None) } else { TmpSize::read(item, faults).map(Some) }
    }

    fn show(value: &Self::Value) -> Shown {
        value.as_ref().map_or_else(|| Shown::One(toml_string("none")), TmpSize::show)
    }

    fn schema() -> Json {
        json!({ "anyOf": [TmpSize::schema(), { "const": "none" }] })
    }
}

/// `"empty"`, `"host"` or a directory.
pub struct RootDirectory;

impl Text for RootDirectory {
    type Value = Root;
    const WHAT: &'static str = "a root";
    const HELP: &'static str = "write \"empty\", \"host\" or the absolute path of a directory";

    fn parse(text: &str) -> Result<Root, Wrong> {
        match text {
            "empty" => Ok(Root::Empty),
            "host" => Ok(Root::Host),
            _ if !text.starts_with('/') => Err(Wrong::is_not(text, Self::WHAT, Self::HELP)),
            _ => {
                let path = absolute(text, Self::HELP)?;
                if is_one_of_or_below(&path, &["/proc", "/sys", "/dev"]) || path == Path::new("/") {
                    let message = format!("is {text:?}, which would show the program all of it");
                    return Err(Wrong::new(message, "write \"host\" for the host's programs"));
                }
                Ok(Root::Directory(path))
            }
        }
    }

    fn show(value: &Root) -> String {
        match value {
            Root::Empty => "empty".to_owned(),
            Root::Host => "host".to_owned(),
            Root::Directory(path) => path.display().to_string(),
        }
    }

    fn pattern() -> Option<&'static str> {
        Some("^(empty|host|/.+)$")
    }
}

/// An absolute path.
pub struct AbsolutePath;

impl Text for AbsolutePath {
    type Value = PathBuf;
    const WHAT: &'static str = "an absolute path";
    const HELP: &'static str = "write one that begins with \"/\" and has no \"..\" in it";

    fn parse(text: &str) -> Result<PathBuf, Wrong> {
        absolute(text, Self::HELP)
    }

    fn show(value: &PathBuf) -> String {
        value.display().to_string()
    }

    fn pattern() -> Option<&'static str> {
        Some("^/")
    }
}

/// Reads an absolute path; repeated and final slashes and `.` are dropped.
fn absolute(text: &str, help: &str) -> Result<PathBuf, Wrong> {
    let path = Path::new(text);
    if !path.is_absolute() {
        return Err(Wrong::is_not(text, "an absolute path", help));
    }
    if path.components().any(|component| component == Component::ParentDir) {
        return Err(Wrong::new(format!("is {text:?}, which has \"..\" in it"), help));
    }
    Ok(path.components().collect())
}

fn is_one_of_or_below(path: &Path, roots: &[&str]) -> bool {
    roots.iter().any(|root| path.starts_with(root))
}

/// One entry of `[filesystem] bind`.
pub struct BindEntry;

impl Kind for BindEntry {
    type Value = Bind;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<Bind> {
        if !item.is_table() {
            let help =
                "write { source = \"/on/the/host\", target = \"/inside\", read_only = true }";
            faults.push(item.wrong("a table", help));
            return None;
        }
        item.table(faults, |table, faults| {
            let source = required(table, "source", item, faults, bind_source);
            let target = required(table, "target", item, faults, bind_target);
            let read_only = match table.take("read_only") {
                Some(item) => Flag::read(&item, faults),
                None => Some(true),
            };
            Some(Bind { source: source?, target: target?, read_only: read_only? })
        })?
    }

    fn show(value: &Bind) -> Shown {
        let text = |path: &Path| toml_string(&path.display().to_string());
        let (source, target) = (text(&value.source), text(&value.target));
        Shown::One(format!(
            "{{ source = {source}, target = {target}, read_only = {} }}",
            value.read_only
        ))
    }

    fn schema() -> Json {
        let path = AbsolutePath::schema();
        json!({
            "type": "object",
            "properties": { "source": path, "target": path, "read_only": Flag::schema() },
            "required": ["source", "target"],
            "additionalProperties": false,
        })
    }
}

fn required(
    table: &mut Table<'_>,
    key: &'static str,
    entry: &Item<'_>,
    faults: &mut Vec<Fault>,
    check: fn(&Path) -> Result<(), Wrong>,
) -> Option<PathBuf> {
    let Some(item) = table.take(key) else {
        let message = format!("has an entry without {key}");
        faults.push(entry.fault(message, format!("write {key} = \"/a/path\"")));
        return None;
    };
    let path = AbsolutePath::read(&item, faults)?;
    check(&path).map_err(|wrong| faults.push(item.fault(wrong.message, wrong.help))).ok()?;
    Some(path)
}

fn bind_source(path: &Path) -> Result<(), Wrong> {
    if path == Path::new("/") || is_one_of_or_below(path, &["/proc"]) {
        let message = format!("is {:?}, which would show the host's own", path.display());
        return Err(Wrong::new(message, "write the one directory or file that is needed"));
    }
    Ok(())
}

fn bind_target(path: &Path) -> Result<(), Wrong> {
    let ours = ["/proc", "/dev", "/run/dispatcher"];
    // /run itself would cover /run/dispatcher.
    let covers = [Path::new("/"), Path::new("/run")].contains(&path);
    if covers || is_one_of_or_below(path, &ours) {
        let message = format!("is {:?}, which the jail needs for itself", path.display());
        let help = "write a target outside of /proc, /dev and /run/dispatcher";
        return Err(Wrong::new(message, help));
    }
    Ok(())
}

/// A seccomp profile: `"default"`, or NAME of `DIR/seccomp/NAME.json`.
pub struct ProfileName;

impl Text for ProfileName {
    type Value = String;
    const WHAT: &'static str = "the name of a profile";
    const HELP: &'static str = "write \"default\", or NAME for the file seccomp/NAME.json";

    fn parse(text: &str) -> Result<String, Wrong> {
        match text.parse::<Namespace>() {
            Ok(name) => Ok(name.into()),
            Err(error) => Err(Wrong::new(format!("is {text:?}, which {error}"), Self::HELP)),
        }
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// Above every system call number in use.
const SYSCALLS_END: u32 = 1024;

/// A system call, by name.
pub struct Syscall;

impl Text for Syscall {
    type Value = String;
    const WHAT: &'static str = "the name of a system call";
    const HELP: &'static str = "write its name, such as \"memfd_create\"";

    fn parse(text: &str) -> Result<String, Wrong> {
        match syscalls::number(text) {
            Some(_) => Ok(text.to_owned()),
            None => {
                let known = (0..SYSCALLS_END).filter_map(syscalls::name);
                Err(unknown(text, "a system call of this architecture", known))
            }
        }
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// A system call that a policy may add to its profile.
pub struct AllowedSyscall;

impl Text for AllowedSyscall {
    type Value = String;
    const WHAT: &'static str = Syscall::WHAT;
    const HELP: &'static str = Syscall::HELP;

    fn parse(text: &str) -> Result<String, Wrong> {
        if deadly::is_deadly_name(text) {
            let message = format!("has {text:?}, which is deadly in every profile");
            return Err(Wrong::new(message, "leave it out: no policy can allow it"));
        }
        if text == "clone3" {
            // Its flags lie in memory, where no filter can look for NEW* ones.
            let message = "has \"clone3\", whose flags no filter can read";
            return Err(Wrong::new(message, "leave it out: programs fall back to clone"));
        }
        Syscall::parse(text)
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// A capability, by name, with or without `CAP_`; its number.
pub struct Capability;

impl Text for Capability {
    type Value = u8;
    const WHAT: &'static str = "the name of a capability";
    const HELP: &'static str = "write its name, such as \"CAP_NET_RAW\"";

    fn parse(text: &str) -> Result<u8, Wrong> {
        let upper = text.to_ascii_uppercase();
        let name = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        caps::Capability::from_str(&name).map(|capability| capability.index()).map_err(|_| {
            let mut known: Vec<String> = caps::all().iter().map(ToString::to_string).collect();
            known.sort();
            let mut wrong = unknown(&name, "a capability", known.iter().map(String::as_str));
            wrong.message = format!("has {text:?}, which is not a capability");
            wrong
        })
    }

    fn show(value: &u8) -> String {
        let named = caps::all().into_iter().find(|capability| capability.index() == *value);
        named.map_or_else(|| format!("#{value}"), |capability| capability.to_string())
    }
}

/// A host user's name; empty for nobody.
pub struct UserName;

impl Text for UserName {
    type Value = String;
    const WHAT: &'static str = "the name of a user";
    const HELP: &'static str = "write the name of an unprivileged user of this host";

    fn parse(text: &str) -> Result<String, Wrong> {
        if text == "root" {
            return Err(Wrong::new("is \"root\", which no call may run as", Self::HELP));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '$' | '@');
        let number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !text.chars().all(plain) || text.starts_with('-') || number || text.len() > 255 {
            return Err(Wrong::is_not(text, Self::WHAT, Self::HELP));
        }
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// The name of an environment variable that a policy or a call may set.
pub struct VariableName;

impl Text for VariableName {
    type Value = String;
    const WHAT: &'static str = "the name of an environment variable";
    const HELP: &'static str = "write letters, digits and _, no digit first";

    fn parse(text: &str) -> Result<String, Wrong> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if text.is_empty()
            || !text.chars().all(plain)
            || text.starts_with(|c: char| c.is_ascii_digit())
        {
            return Err(Wrong::is_not(text, Self::WHAT, Self::HELP));
        }
        if is_reserved_variable(text) {
            let message = format!("has {text:?}, which the dispatcher sets by itself");
            return Err(Wrong::new(message, "leave it out"));
        }
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }

    fn pattern() -> Option<&'static str> {
        Some("^[A-Za-z_][A-Za-z0-9_]*$")
    }
}

/// Whether a variable is the dispatcher's to set, not a policy's or a request's.
#[must_use]
pub fn is_reserved_variable(name: &str) -> bool {
    name.starts_with("DISPATCHER_")
        || name.starts_with("LISTEN_")
        || matches!(name, "GRPC_INPUT_DATA" | "GRPC_UNIX_SOCKET")
}

/// `[environment] set`: merged key by key.
pub struct Variables;

impl Kind for Variables {
    type Value = BTreeMap<String, At<String>>;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<Self::Value> {
        if !item.is_table() {
            faults.push(item.wrong("a table", "write set = { NAME = \"value\" }"));
            return None;
        }
        let mut whole = true;
        let variables = item.table(faults, |table, faults| {
            let mut variables = BTreeMap::new();
            for (name, value) in table.take_all() {
                let checked = VariableName::parse(name.value).map_err(|wrong| {
                    let message = format!("{} {}", item.key(), wrong.message);
                    faults.push(Fault::new(&name.place, message, wrong.help));
                });
                match (checked, VariableValue::read(&value, faults)) {
                    (Ok(name), Some(text)) => {
                        _ = variables.insert(name, At { value: text, place: value.place() });
                    }
                    _ => whole = false,
                }
            }
            variables
        })?;
        whole.then_some(variables)
    }

    fn inherit(given: &Self::Value, inherited: &Self::Value) -> Self::Value {
        let mut merged = inherited.clone();
        merged.extend(given.clone());
        merged
    }

    fn show(value: &Self::Value) -> Shown {
        let show = |(name, item): (&String, &At<String>)| {
            (name.clone(), At { value: toml_string(&item.value), place: item.place.clone() })
        };
        Shown::Map(value.iter().map(show).collect())
    }

    fn schema() -> Json {
        json!({
            "type": "object",
            "propertyNames": {
                "pattern": "^[A-Za-z_][A-Za-z0-9_]*$",
                "not": { "pattern": "^(DISPATCHER_|LISTEN_|GRPC_INPUT_DATA$|GRPC_UNIX_SOCKET$)" },
            },
            "additionalProperties": { "type": "string" },
        })
    }
}

/// Any text.
struct VariableValue;

impl Text for VariableValue {
    type Value = String;
    const WHAT: &'static str = "a text";
    const HELP: &'static str = "write it in quotes";

    fn parse(text: &str) -> Result<String, Wrong> {
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// A `SERVICE/METHOD` glob.
pub struct CallGlob;

impl Text for CallGlob {
    type Value = Glob;
    const WHAT: &'static str = "a SERVICE/METHOD glob";
    const HELP: &'static str = Glob::HELP;

    fn parse(text: &str) -> Result<Glob, Wrong> {
        Glob::parse(text).map_err(|why| Wrong::new(why, Glob::HELP))
    }

    fn show(value: &Glob) -> String {
        value.to_string()
    }
}

/// A prefix of `service_uri`.
pub struct UriPrefix;

impl Text for UriPrefix {
    type Value = String;
    const WHAT: &'static str = "the beginning of a URI";
    const HELP: &'static str =
        "write scheme, host and a slash at least, such as \"https://example.com/\"";

    fn parse(text: &str) -> Result<String, Wrong> {
        let visible = |c: char| c.is_ascii_graphic();
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(Wrong::is_not(text, Self::WHAT, Self::HELP));
        };
        let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+.-".contains(c);
        if !scheme.starts_with(|c: char| c.is_ascii_lowercase())
            || !scheme.chars().all(letters)
            || !rest.chars().all(visible)
        {
            return Err(Wrong::is_not(text, Self::WHAT, Self::HELP));
        }
        if scheme == "sha256" {
            let message = format!("has {text:?}, but what is held needs no entry");
            return Err(Wrong::new(message, "leave it out, or use artifacts.digests"));
        }
        // Without it "https://example.com" would also fit https://example.com.evil.org.
        if rest.strip_prefix("//").is_some_and(|rest| !rest.contains('/')) {
            let message = format!("has {text:?}, which other hosts' names begin with too");
            return Err(Wrong::new(message, format!("write \"{text}/\"")));
        }
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// The digest of an executable.
pub struct ArtifactDigest;

impl Text for ArtifactDigest {
    type Value = Digest;
    const WHAT: &'static str = "a digest";
    const HELP: &'static str = "write \"sha256:\" followed by 64 hexadecimal digits";

    fn parse(text: &str) -> Result<Digest, Wrong> {
        text.parse().map_err(|_| Wrong::is_not(text, Self::WHAT, Self::HELP))
    }

    fn show(value: &Digest) -> String {
        value.to_string()
    }

    fn pattern() -> Option<&'static str> {
        Some("^sha256:[0-9A-Fa-f]{64}$")
    }
}

/// A container image; empty for the dispatcher's own.
pub struct ImageName;

impl Text for ImageName {
    type Value = String;
    const WHAT: &'static str = "the name of an image";
    const HELP: &'static str = "write such as \"registry.example.com/team/image:tag\"";

    fn parse(text: &str) -> Result<String, Wrong> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "./:@_-".contains(c);
        if text.len() > 512 || !text.chars().all(plain) || text.starts_with('-') {
            return Err(Wrong::is_not(text, Self::WHAT, Self::HELP));
        }
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// An OCI runtime; empty for Docker's default.
pub struct RuntimeName;

impl Text for RuntimeName {
    type Value = String;
    const WHAT: &'static str = "the name of a runtime";
    const HELP: &'static str = "write a name that Docker knows, such as \"runsc\"";

    fn parse(text: &str) -> Result<String, Wrong> {
        if text.is_empty() || text.parse::<Namespace>().is_ok() {
            return Ok(text.to_owned());
        }
        Err(Wrong::is_not(text, Self::WHAT, Self::HELP))
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}
