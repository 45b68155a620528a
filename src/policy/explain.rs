//! The policy in force for a namespace or a method: each value with the place
//! that gave it, and what the launcher will do by it.
//!
//! The values are printed as a policy file: what `explain` prints can be read
//! back, and means the same.

use std::fmt::Write as _;

use super::{
    Policy,
    check::is_ignored_in_direct_mode,
    choose::{DEFAULT, most_specific},
    compile::Loaded,
    fault::{At, Place},
    kinds::{Kind as _, List, Shown},
    outline,
    resolve::Effective,
    tables::Entry,
    values::CallGlob,
    written::Resolved,
};
use crate::{
    jail::plan::Mode,
    names::{MethodName, Namespace, ServiceName},
};

/// Where comments begin, where the value leaves room.
const COMMENT_COLUMN: usize = 44;

/// Explains the policy of `namespace`, or what it says about one method.
/// `None` where the namespace has no policy, not even `default`.
#[must_use]
pub fn explain(
    loaded: &Loaded,
    namespace: &Namespace,
    call: Option<(&ServiceName, &MethodName)>,
) -> Option<String> {
    let name = [namespace.as_str(), DEFAULT]
        .into_iter()
        .find(|name| loaded.effective.contains_key(*name))?;
    let effective = loaded.effective.get(name)?;
    let family = loaded.set.policies.get(name)?;
    let mut text = heading(namespace, effective);
    let (mut holds, mut policy) = (&effective.resolved, &family.base);
    if let Some((service, method)) = call {
        let (service, method) = (service.as_str(), method.as_str());
        let (allowed, verdict) = verdict(holds, service, method);
        text.push_str(&verdict);
        if !allowed {
            return Some(text);
        }
        let rules = effective.overrides.iter().enumerate();
        let rules = rules.map(|(index, special)| (special.glob.value.to_string(), index));
        let rules: Vec<(String, usize)> = rules.collect();
        let rules = rules.iter().map(|(glob, index)| (glob.as_str(), *index));
        if let Some(index) = most_specific(rules, service, method) {
            let special = &effective.overrides[index];
            (holds, policy) = (&special.resolved, &family.overrides[index].1);
            let glob = &special.glob;
            _ = writeln!(text, "# by [service.\"{}\"] ({})", glob.value, glob.place);
        }
    } else {
        for special in &effective.overrides {
            let glob = &special.glob;
            _ = writeln!(text, "# other rules for [service.\"{}\"] ({})", glob.value, glob.place);
        }
    }
    _ = writeln!(text, "# digest {}\n", policy.digest);
    text.push_str(&values(holds));
    text.push_str(&plan(policy));
    Some(text)
}

fn heading(namespace: &Namespace, effective: &Effective) -> String {
    let mut text = format!(
        "# policy {:?} for namespace {namespace:?}",
        effective.name,
        namespace = namespace.as_str()
    );
    if let [_, parents @ ..] = effective.chain.as_slice() {
        for parent in parents {
            _ = write!(text, ", extends {parent:?}");
        }
    }
    text.push('\n');
    text
}

/// Whether the method may be called, and which line says so.
fn verdict(holds: &Resolved, service: &str, method: &str) -> (bool, String) {
    let allow = &holds.services.allow;
    let by = allow.value.items.iter().find(|glob| glob.value.matches(service, method));
    let said = match by {
        Some(At { value, place }) => format!("allowed by services.allow \"{value}\" ({place})"),
        None => format!(
            "refused (service_not_allowed), no glob matches: services.allow = {} ({})",
            List::<CallGlob>::show(&allow.value).inline(),
            allow.place
        ),
    };
    (by.is_some(), format!("# {service}/{method}: {said}\n"))
}

/// Every value as in a policy file, its place as a comment.
fn values(holds: &Resolved) -> String {
    let mut text = String::new();
    let mut table = "";
    for entry in holds.entries() {
        if entry.table != table {
            table = entry.table;
            _ = writeln!(text, "\n[{table}]");
        }
        if holds.general.mode.value == Mode::Direct && is_ignored_in_direct_mode(&entry, holds) {
            let line = format!("# {} = {}", entry.key, entry.shown.inline());
            _ = writeln!(text, "{line:COMMENT_COLUMN$}  # {}, not in direct mode", entry.place);
        } else {
            push_entry(&mut text, &entry);
        }
    }
    text
}

fn push_entry(text: &mut String, entry: &Entry<'_>) {
    let key = entry.key;
    match &entry.shown {
        Shown::List(items) if items.iter().any(|item| differs(&item.place, entry.place)) => {
            push_line(text, &format!("{key} = ["), None);
            for item in items {
                push_line(text, &format!("    {},", item.value), Some(&item.place));
            }
            push_line(text, "]", Some(entry.place));
        }
        Shown::Map(entries) if !entries.is_empty() => {
            for (name, item) in entries {
                push_line(text, &format!("{key}.{name} = {}", item.value), Some(&item.place));
            }
        }
        shown => push_line(text, &format!("{key} = {}", shown.inline()), Some(entry.place)),
    }
}

/// Whether they are shown differently: the column is not.
fn differs(one: &Place, other: &Place) -> bool {
    one.to_string() != other.to_string()
}

fn push_line(text: &mut String, line: &str, place: Option<&Place>) {
    _ = match place {
        Some(place) => writeln!(text, "{line:COMMENT_COLUMN$}  # {place}"),
        None => writeln!(text, "{line}"),
    };
}

fn plan(policy: &Policy) -> String {
    let mut text = String::from("\n# What a call goes through:\n");
    for (index, step) in outline::steps(policy).iter().enumerate() {
        _ = writeln!(text, "# {:2}. {step}", index + 1);
    }
    text
}
