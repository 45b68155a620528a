//! From files to what holds: `extends` followed, tables merged key by key,
//! built-in defaults below, and every value with the place that gave it.

use std::collections::BTreeMap;

use super::{
    fault::{At, Fault, Place, did_you_mean},
    glob::Glob,
    written::{PolicyFile, Resolved, built_in},
};

/// Most files that one policy may be made of, itself included.
const CHAIN_MAX: usize = 16;

/// A policy with everything inherited, not yet checked as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Effective {
    /// Its name.
    pub name: String,
    /// The first character of its own file.
    pub start: Place,
    /// The files that it is made of: itself first, the one without `extends` last.
    pub chain: Vec<String>,
    /// What holds.
    pub resolved: Resolved,
    /// What holds for some methods: ancestors' `[service."…"]` tables first,
    /// then this file's own in their order.
    pub overrides: Vec<EffectiveOverride>,
}

/// What holds for the methods that a glob matches.
#[derive(Clone, Debug, PartialEq)]
pub struct EffectiveOverride {
    /// Which methods.
    pub glob: At<Glob>,
    /// What holds for them.
    pub resolved: Resolved,
}

/// Resolves every policy. A file that could not be read is `None` in `files`;
/// policies that need it are left out without a further fault.
#[must_use]
pub fn resolve(
    files: &BTreeMap<String, Option<PolicyFile>>,
    faults: &mut Vec<Fault>,
) -> BTreeMap<String, Effective> {
    let mut effective = BTreeMap::new();
    for file in files.values().flatten() {
        if let Some(chain) = chain(file, files, faults) {
            effective.insert(file.name.clone(), merge(&chain));
        }
    }
    effective
}

/// The file and all that it extends, nearest first.
fn chain<'a>(
    file: &'a PolicyFile,
    files: &'a BTreeMap<String, Option<PolicyFile>>,
    faults: &mut Vec<Fault>,
) -> Option<Vec<&'a PolicyFile>> {
    let mut chain = vec![file];
    let mut last = file;
    while let Some(extends) = &last.extends {
        let name = extends.value.as_str();
        let Some(found) = files.get(name) else {
            let known = files.keys().map(String::as_str).filter(|known| *known != last.name);
            let message = format!("extends is {name:?}, and there is no {name}.toml");
            faults.push(Fault::new(&extends.place, message, did_you_mean(name, known)));
            return None;
        };
        let next = found.as_ref()?;
        if let Some(start) = chain.iter().position(|earlier| earlier.name == name) {
            // Told by the members of the circle; those who lead into it are not at fault.
            if start == 0 {
                let names: Vec<&str> =
                    chain.iter().map(|file| file.name.as_str()).chain([name]).collect();
                let message = format!("extends goes in a circle: {}", names.join(" -> "));
                let place = &file.extends.as_ref()?.place;
                faults.push(Fault::new(place, message, "leave out one extends of it"));
            }
            return None;
        }
        if chain.len() == CHAIN_MAX {
            let message = format!("extends leads through more than {CHAIN_MAX} files");
            let place = &file.extends.as_ref()?.place;
            faults.push(Fault::new(place, message, "extend a file nearer to the last"));
            return None;
        }
        chain.push(next);
        last = next;
    }
    Some(chain)
}

fn merge(chain: &[&PolicyFile]) -> Effective {
    let mut resolved = built_in().clone();
    for file in chain.iter().rev() {
        resolved.overlay(&file.tables);
    }
    let mut overrides: Vec<EffectiveOverride> = Vec::new();
    for written in chain.iter().rev().flat_map(|file| &file.overrides) {
        let index = overrides.iter().position(|known| known.glob.value == written.glob.value);
        let index = index.unwrap_or_else(|| {
            let glob = written.glob.clone();
            overrides.push(EffectiveOverride { glob, resolved: resolved.clone() });
            overrides.len() - 1
        });
        let target = &mut overrides[index];
        target.glob = written.glob.clone();
        target.resolved.call.overlay(&written.call);
        target.resolved.limits.overlay(&written.limits);
        target.resolved.artifacts.overlay(&written.artifacts);
        target.resolved.instances.overlay(&written.instances);
    }
    let names = chain.iter().map(|file| file.name.clone()).collect();
    Effective {
        name: chain[0].name.clone(),
        start: chain[0].start.clone(),
        chain: names,
        resolved,
        overrides,
    }
}
