//! Paths, and what is made of them: the kinds of `[filesystem]`.

use std::path::{Component, Path, PathBuf};

use serde_json::{Value as Json, json};

use super::super::{
    fault::Fault,
    kinds::{Flag, Kind, Shown, Text, Wrong, toml_string},
    quantities::{Bytes, Limited},
    read::{Item, Table},
};
use crate::{
    jail::plan::{Bind, Root},
    units::Limit,
};

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
