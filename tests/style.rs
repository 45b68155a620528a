//! The house rules that no compiler checks.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file with this extension below a directory.
fn files(directory: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut pending = vec![root().join(directory)];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(next).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no .{extension} below {directory}");
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

/// The top-level module that a source file belongs to: `jail` for `src/jail/launcher/run.rs`.
fn module_of(path: &Path) -> String {
    let first = path.strip_prefix(root().join("src")).unwrap().iter().next().unwrap();
    first.to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// The code of a line, without a comment at its end.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap()
}

/// The rank of each module by ARCHITECTURE.md's list: modules on one line are equals.
fn ranks() -> BTreeMap<String, usize> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let rooms =
        text.split("## The rooms").nth(1).expect("ARCHITECTURE.md has a section \"The rooms\"");
    let rooms = rooms.split("\n## ").next().unwrap();
    let mut ranks = BTreeMap::new();
    for (rank, line) in rooms.lines().enumerate() {
        for word in line.split_whitespace() {
            if let Some(name) = word.strip_prefix("src/") {
                let name = name.trim_end_matches('/').trim_end_matches(".rs").to_owned();
                assert!(ranks.insert(name.clone(), rank).is_none(), "src/{name} is listed twice");
            }
        }
    }
    assert!(ranks.len() > 5, "the list was found: {ranks:?}");
    ranks
}

/// The modules that a source text names by `crate::`, also in `use crate::{a, b::c}`.
fn imports(text: &str) -> Vec<String> {
    let text: String = text.lines().map(|line| format!("{}\n", code(line))).collect();
    let mut found = vec![];
    for rest in text.split("crate::").skip(1) {
        let names: Vec<&str> = match rest.strip_prefix('{') {
            Some(group) => top_level_items(group),
            None => vec![rest],
        };
        for name in names {
            let end = name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len());
            found.push(name[..end].to_owned());
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

/// The items of a brace group up to its end: `a, b::{c, d}, e}` has three.
fn top_level_items(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut items) = (0, 0, vec![]);
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => {
                items.push(group[start..at].trim());
                return items;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(group[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    items
}

#[test]
fn import_groups_are_read_rightly() {
    let text =
        "use crate::{\n    a::{b, c},\n    d, // crate::comment\n    e::f,\n};\nuse crate::g::h;\n";
    assert_eq!(imports(text), ["a", "d", "e", "g"]);
}

/// Imports go down ARCHITECTURE.md's list, never up.
#[test]
fn imports_go_down_only() {
    let ranks = ranks();
    let mut faults = vec![];
    for path in files("src", "rs") {
        let module = module_of(&path);
        if module == "lib" || module == "testing" {
            continue;
        }
        let Some(rank) = ranks.get(&module) else {
            faults.push(format!("{} belongs to no room of ARCHITECTURE.md", shown(&path)));
            continue;
        };
        for name in imports(&fs::read_to_string(&path).unwrap()) {
            match ranks.get(&name) {
                // Fixtures for unit tests, compiled for nothing else.
                _ if name == "testing" => {}
                Some(other) if *other <= *rank && name != module => {
                    faults.push(format!(
                        "{} imports {name}, which is not below {module}",
                        shown(&path)
                    ));
                }
                _ => {} // an item of the crate's root, or a room further down
            }
        }
    }
    faults.dedup();
    assert!(faults.is_empty(), "{faults:#?}");
}

/// What a room must not know of.
#[test]
fn some_rooms_do_without() {
    let rules: [(&str, &[&str]); 3] = [
        ("jail", &["tokio", "toml", "tonic", "prost", "clap", "hyper", "bollard", "tracing"]),
        ("policy", &["rustix", "tokio", "tonic"]),
        ("monitor", &["tokio", "tonic", "prost", "toml"]),
    ];
    let mut faults = vec![];
    for path in files("src", "rs") {
        let module = module_of(&path);
        let text = fs::read_to_string(&path).unwrap();
        for (room, crates) in rules {
            for name in crates.iter().filter(|_| room == module) {
                let uses = |line: &str| {
                    let line = code(line);
                    line.contains(&format!("{name}::")) || line.contains(&format!("use {name};"))
                };
                if let Some(line) = text.lines().position(uses) {
                    faults.push(format!("{}:{} uses {name}", shown(&path), line + 1));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// Unsafe code is where it can be looked after.
#[test]
fn unsafe_code_stays_where_it_is_looked_after() {
    let mut faults = vec![];
    for path in files("src", "rs") {
        let allowed = ["sys", "jail", "packets", "host"].contains(&module_of(&path).as_str())
            // The program that stands among the sources, not what the crate has there.
            || path.starts_with(root().join("src/container/init"))
            || path == root().join("src/container/init.rs");
        let text = fs::read_to_string(&path).unwrap();
        for (number, line) in text.lines().enumerate() {
            let line = code(line);
            if !allowed && (line.contains("unsafe {") || line.contains("unsafe fn")) {
                faults.push(format!("{}:{}", shown(&path), number + 1));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn files_are_of_readable_size() {
    const LINES_MAX: usize = 600;
    let sources = [files("src", "rs"), files("tests", "rs"), files("tests", "c")].concat();
    let faults: Vec<_> = sources
        .iter()
        .map(|path| (shown(path), fs::read_to_string(path).unwrap().lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .collect();
    assert!(faults.is_empty(), "over {LINES_MAX} lines: {faults:#?}");
}

/// Words that mean that something isn't finished, and traces of tidying left undone.
#[test]
fn nothing_is_left_unfinished() {
    let words = [
        ["to", "do!("].concat(),
        ["unimplemen", "ted!("].concat(),
        ["db", "g!("].concat(),
        ["FIX", "ME"].concat(),
        ["XX", "X"].concat(),
        ["HA", "CK"].concat(),
        ["#[ign", "ore]"].concat(),
    ];
    let mut faults = vec![];
    for path in [files("src", "rs"), files("tests", "rs"), files("tests", "c")].concat() {
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            for word in words.iter().filter(|word| line.contains(*word)) {
                faults.push(format!("{}:{}: {word}", shown(&path), number + 1));
            }
            if line.ends_with([' ', '\t']) {
                faults.push(format!("{}:{}: space at the end", shown(&path), number + 1));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// Nothing that is kept tells of the machine it was written on.
#[test]
fn no_paths_of_this_machine() {
    let listing = Command::new("git").arg("ls-files").current_dir(root()).output();
    let Some(listing) = listing.ok().filter(|output| output.status.success()) else {
        eprintln!("skipped: not a git checkout");
        return;
    };
    let words = [
        ["/work", "/shared"].concat(),
        ["/work", "/main"].concat(),
        ["/work", "/."].concat(),
        ["/tmp", "/wt"].concat(),
        ["/ro", "ot/."].concat(),
        ["sub", "agent"].concat(),
    ];
    let mut faults = vec![];
    for name in String::from_utf8(listing.stdout).unwrap().lines() {
        // What is no text holds no words.
        let Ok(text) = fs::read_to_string(root().join(name)) else { continue };
        for word in words.iter().filter(|word| text.contains(*word)) {
            faults.push(format!("{name}: {word}"));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// The documents point at what is there.
#[test]
fn links_in_documents_lead_somewhere() {
    let mut faults = vec![];
    let top = fs::read_dir(root()).unwrap().flatten().map(|entry| entry.path());
    for path in top.filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        let text = fs::read_to_string(&path).unwrap();
        for rest in text.split("](").skip(1) {
            let target = rest.split([')', '#', ' ']).next().unwrap();
            let elsewhere =
                target.is_empty() || target.contains("://") || target.starts_with("mailto:");
            if !elsewhere && !root().join(target).exists() {
                faults.push(format!("{} points at {target}", shown(&path)));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}
