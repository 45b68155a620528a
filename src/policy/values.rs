//! The kinds of values that only policies have.

mod environment;
mod filesystem;

use std::str::FromStr as _;

use serde_json::{Value as Json, json};

use super::{
    Argv, OutputFormat, Protocol,
    glob::Glob,
    kinds::{Text, Words, Wrong, unknown},
};
use crate::{
    jail::{
        plan::{Control, Mode, Network},
        seccomp::syscalls,
    },
    names::{Digest, Namespace},
};

pub use environment::{VariableName, Variables, is_reserved_variable};
pub use filesystem::{AbsolutePath, BindEntry, RootDirectory, Tmp};

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

    fn text_schema() -> Json {
        json!({ "enum": Control::ALL.map(Control::word) })
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
