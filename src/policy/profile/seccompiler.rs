//! The seccompiler crate's JSON form: an object of one named filter.
//!
//! Its own compiler is not asked: it does not know newer calls, and loses the
//! bare rule of a call that is also listed with arguments.

use std::{collections::BTreeMap, fmt};

use seccompiler::{SeccompAction, SeccompCmpArgLen, SeccompCmpOp};
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor},
};

use super::Builder;
use crate::jail::plan::{ArgumentCondition, Comparison};

/// Reads `json` into `profile`, faults included.
pub(super) fn read(json: &str, profile: &mut Builder) -> serde_json::Result<()> {
    let OnlyFilter(filter) = serde_json::from_str(json)?;
    if filter.match_action != SeccompAction::Allow {
        profile.fault("filter_action", "a profile is an allowlist: it must be `allow`");
    }
    match filter.mismatch_action {
        SeccompAction::Errno(errno) => {
            profile.default_errno = profile.errno("default_action", errno);
        }
        // They answer an errno here: kept out either way, and the report names them.
        SeccompAction::KillThread | SeccompAction::KillProcess | SeccompAction::Trap => {}
        SeccompAction::Allow | SeccompAction::Log | SeccompAction::Trace(_) => {
            profile.fault("default_action", "a profile is an allowlist: it must be an errno");
        }
    }
    let mut seen = BTreeMap::new();
    for (index, rule) in filter.rules.iter().enumerate() {
        let place = format!("filter[{index}]");
        let Some(number) = profile.number(&place, &rule.syscall) else { continue };
        let bare = rule.args.is_none();
        if seen.insert(number, bare).is_some_and(|earlier| bare || earlier) {
            profile.fault(
                &place,
                format_args!(
                    "`{}` is listed twice, once for all arguments: seccompiler would let only \
                     one of the two count",
                    rule.syscall
                ),
            );
            continue;
        }
        let conditions = rule.args.as_ref().map(|args| read_arguments(&place, args, profile));
        profile.allow(number, conditions);
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Filter {
    #[serde(alias = "default_action")]
    mismatch_action: SeccompAction,
    #[serde(alias = "filter_action")]
    match_action: SeccompAction,
    #[serde(rename = "filter")]
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    syscall: String,
    args: Option<Vec<Argument>>,
    #[serde(rename = "comment")]
    _comment: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Argument {
    index: u8,
    #[serde(rename = "type")]
    length: SeccompCmpArgLen,
    op: SeccompCmpOp,
    #[serde(rename = "val")]
    value: u64,
    #[serde(rename = "comment")]
    _comment: Option<String>,
}

/// The form has a filter for each kind of thread; a run has one kind.
struct OnlyFilter(Filter);

impl<'de> Deserialize<'de> for OnlyFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OnlyEntry;

        impl<'de> Visitor<'de> for OnlyEntry {
            type Value = Filter;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one filter in it")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Filter, A::Error> {
                let Some((first, filter)) = map.next_entry::<String, Filter>()? else {
                    return Err(de::Error::custom(
                        "neither `defaultAction` (OCI) nor a filter (seccompiler) is there",
                    ));
                };
                match map.next_key::<String>()? {
                    None => Ok(filter),
                    Some(second) => Err(de::Error::custom(format_args!(
                        "one filter expected, but there are `{first}` and `{second}`"
                    ))),
                }
            }
        }

        deserializer.deserialize_map(OnlyEntry).map(Self)
    }
}

fn read_arguments(place: &str, args: &[Argument], profile: &mut Builder) -> Vec<ArgumentCondition> {
    if args.is_empty() {
        profile.fault(place, "`args` is empty: leave it out to allow all arguments");
    }
    args.iter()
        .map(|argument| {
            let (comparison, value) = comparison(argument);
            let wide = argument.length == SeccompCmpArgLen::Qword;
            ArgumentCondition { index: argument.index, wide, comparison, value }
        })
        .collect()
}

fn comparison(argument: &Argument) -> (Comparison, u64) {
    let value = argument.value;
    match argument.op {
        SeccompCmpOp::Eq => (Comparison::Equal, value),
        SeccompCmpOp::Ge => (Comparison::GreaterOrEqual, value),
        SeccompCmpOp::Gt => (Comparison::Greater, value),
        SeccompCmpOp::Le => (Comparison::LessOrEqual, value),
        SeccompCmpOp::Lt => (Comparison::Less, value),
        SeccompCmpOp::Ne => (Comparison::NotEqual, value),
        // seccompiler masks both sides.
        SeccompCmpOp::MaskedEq(mask) => (Comparison::MaskedEqual { mask }, value & mask),
    }
}
