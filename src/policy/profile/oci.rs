//! The OCI runtime specification's form, with the additions of Docker
//! (`archMap`, `includes`, `excludes`, `comment`) and Podman (`errno` names).

use std::collections::BTreeSet;

use serde::Deserialize;

use super::Builder;
use crate::jail::plan::{ArgumentCondition, Comparison};

/// The oldest kernel that jails run on (close_range): rules for kernels up to
/// it hold; whether rules for newer ones do cannot be known ahead.
const OLDEST_KERNEL: (u32, u32) = (5, 9);

/// Reads `json` into `profile`, faults included.
pub(super) fn read(json: &str, profile: &mut Builder) -> serde_json::Result<()> {
    let oci: Profile = serde_json::from_str(json)?;
    read_top(&oci, profile);
    let mut refused = Vec::new();
    for (index, rule) in oci.syscalls.unwrap_or_default().into_iter().enumerate() {
        read_rule(&format!("syscalls[{index}]"), &rule, profile, &mut refused);
    }
    for (place, number, name) in refused {
        if profile.allowed.contains_key(&number) {
            profile.fault(&place, format_args!("`{name}` is both allowed and refused"));
        }
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    /// Podman's; the name of `default_errno_ret`.
    #[serde(rename = "defaultErrno")]
    default_errno_name: Option<String>,
    architectures: Option<Vec<String>>,
    arch_map: Option<Vec<ArchMap>>,
    flags: Option<Vec<String>>,
    listener_path: Option<String>,
    listener_metadata: Option<String>,
    syscalls: Option<Vec<Rule>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ArchMap {
    architecture: String,
    /// Whether there are 32-bit ones changes nothing: their entries are deadly.
    #[serde(rename = "subArchitectures")]
    _sub_architectures: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    /// Docker's older form.
    name: Option<String>,
    action: String,
    errno_ret: Option<u32>,
    /// Podman's; the name of `errno_ret`.
    #[serde(rename = "errno")]
    errno_name: Option<String>,
    args: Option<Vec<Argument>>,
    #[serde(rename = "comment")]
    _comment: Option<String>,
    includes: Option<Filter>,
    excludes: Option<Filter>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Argument {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// Where a rule holds, or does not.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Filter {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

const KILLS: [&str; 4] =
    ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"];

const X86_64: &str = "SCMP_ARCH_X86_64";

fn read_top(oci: &Profile, profile: &mut Builder) {
    // Calls that are not listed answer an errno here also where the profile
    // would kill: they are kept out either way, and the report names them.
    let place = "defaultAction";
    match oci.default_action.as_str() {
        "SCMP_ACT_ERRNO" => {
            profile.default_errno =
                oci.default_errno_ret.and_then(|errno| profile.errno("defaultErrnoRet", errno));
        }
        action if KILLS.contains(&action) => {}
        other => profile
            .fault(place, format_args!("a profile is an allowlist: SCMP_ACT_ERRNO, not {other}")),
    }
    if oci.default_errno_name.is_some() && oci.default_errno_ret.is_none() {
        profile.fault("defaultErrno", "write its number as defaultErrnoRet");
    }
    let listed = oci.architectures.as_ref().is_none_or(|list| list.iter().any(|a| a == X86_64));
    let mapped = oci
        .arch_map
        .as_ref()
        .is_none_or(|list| list.iter().any(|entry| entry.architecture == X86_64));
    if !listed || !mapped {
        profile.fault("architectures", format_args!("{X86_64} is missing: this is not for here"));
    }
    for flag in oci.flags.iter().flatten() {
        profile.fault("flags", format_args!("{flag} cannot be expressed"));
    }
    if oci.listener_path.is_some() || oci.listener_metadata.is_some() {
        profile.fault("listenerPath", "cannot be expressed: the dispatcher itself listens");
    }
}

/// Reads one rule. `refused` collects what SCMP_ACT_ERRNO rules name.
fn read_rule(
    place: &str,
    rule: &Rule,
    profile: &mut Builder,
    refused: &mut Vec<(String, u32, String)>,
) {
    if !holds(place, rule, profile) {
        return;
    }
    let names: BTreeSet<&String> = rule.names.iter().chain(&rule.name).collect();
    if names.is_empty() {
        profile.fault(place, "it names no system call");
    }
    let numbers: Vec<(u32, &String)> =
        names.into_iter().filter_map(|name| Some((profile.number(place, name)?, name))).collect();
    let args = rule.args.as_deref().unwrap_or_default();
    match rule.action.as_str() {
        "SCMP_ACT_ALLOW" => {
            let conditions = read_arguments(place, args, profile);
            for (number, _) in numbers {
                profile.allow(number, conditions.clone());
            }
        }
        "SCMP_ACT_ERRNO" if args.is_empty() => {
            if rule.errno_name.is_some() && rule.errno_ret.is_none() {
                profile.fault(place, "write the number of errno as errnoRet");
            }
            let errno = profile.errno(place, rule.errno_ret.unwrap_or(libc::EPERM.cast_unsigned()));
            for (number, name) in numbers {
                refused.push((place.to_owned(), number, name.clone()));
                if let Some(errno) = errno {
                    profile.errnos.insert(number, errno);
                }
            }
        }
        "SCMP_ACT_ERRNO" => profile.fault(
            place,
            "an errno for some arguments only cannot be expressed; take the rule out: \
             arguments that no SCMP_ACT_ALLOW rule covers are refused",
        ),
        // Deadly ones are killed as it is.
        action if KILLS.contains(&action) && numbers.is_empty() => {}
        other => profile.fault(
            place,
            format_args!("{other} cannot be expressed; write SCMP_ACT_ALLOW or SCMP_ACT_ERRNO"),
        ),
    }
}

/// Whether a rule holds on x86_64 without capabilities.
fn holds(place: &str, rule: &Rule, profile: &mut Builder) -> bool {
    let ours = |arches: &Vec<String>| arches.iter().any(|a| a == "amd64" || a == "x86_64");
    let mut holds = true;
    if let Some(Filter { caps, arches, min_kernel }) = &rule.includes {
        holds &= caps.as_ref().is_none_or(Vec::is_empty);
        holds &= arches.as_ref().is_none_or(|arches| arches.is_empty() || ours(arches));
        // A rule that is out anyway may ask for any kernel.
        if let Some(version) = min_kernel.as_ref().filter(|_| holds) {
            holds &= has_kernel(place, version, profile);
        }
    }
    if let Some(Filter { caps: _, arches, min_kernel }) = &rule.excludes {
        holds &= !arches.as_ref().is_some_and(ours);
        if let Some(version) = min_kernel.as_ref().filter(|_| holds) {
            holds &= !has_kernel(place, version, profile);
        }
    }
    holds
}

/// Whether the kernel has at least this version.
fn has_kernel(place: &str, version: &str, profile: &mut Builder) -> bool {
    let parsed = version
        .split_once('.')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse::<u32>().ok()?)));
    let (major, minor) = OLDEST_KERNEL;
    match parsed {
        Some(asked) => {
            let has = asked <= OLDEST_KERNEL;
            if !has {
                profile.fault(
                    place,
                    format_args!(
                        "minKernel {version} cannot be decided ahead: only up to {major}.{minor}; \
                         take it out, or the rule",
                    ),
                );
            }
            has
        }
        None => {
            profile.fault(place, format_args!("minKernel `{version}`: write `MAJOR.MINOR`"));
            false
        }
    }
}

/// The conditions of a rule; `None` where it has none.
fn read_arguments(
    place: &str,
    args: &[Argument],
    profile: &mut Builder,
) -> Option<Vec<ArgumentCondition>> {
    let mut conditions: Vec<ArgumentCondition> = Vec::new();
    for (number, argument) in args.iter().enumerate() {
        let place = format!("{place}.args[{number}]");
        let Some(comparison) = comparison(argument) else {
            profile.fault(&place, format_args!("`{}` is no SCMP_CMP_ operator", argument.op));
            continue;
        };
        let Some(index) = u8::try_from(argument.index).ok().filter(|index| *index < 6) else {
            let index = argument.index;
            profile.fault(&place, format_args!("there is no argument {index}, only 0 to 5"));
            continue;
        };
        // Runtimes take two tests of one argument as "either", those of two as "both".
        if conditions.iter().any(|earlier| earlier.index == index) {
            profile.fault(
                &place,
                format_args!(
                    "argument {index} is tested twice in one rule; for either test to do, \
                     write two rules"
                ),
            );
            continue;
        }
        let masked = matches!(comparison, Comparison::MaskedEqual { .. });
        let value = if masked { argument.value_two } else { argument.value };
        conditions.push(ArgumentCondition { index, wide: true, comparison, value });
    }
    (!args.is_empty()).then_some(conditions)
}

/// All 64 bits take part, as in libseccomp.
fn comparison(argument: &Argument) -> Option<Comparison> {
    Some(match argument.op.as_str() {
        "SCMP_CMP_NE" => Comparison::NotEqual,
        "SCMP_CMP_LT" => Comparison::Less,
        "SCMP_CMP_LE" => Comparison::LessOrEqual,
        "SCMP_CMP_EQ" => Comparison::Equal,
        "SCMP_CMP_GE" => Comparison::GreaterOrEqual,
        "SCMP_CMP_GT" => Comparison::Greater,
        // `value` is the mask, `valueTwo` what must be left.
        "SCMP_CMP_MASKED_EQ" => Comparison::MaskedEqual { mask: argument.value },
        _ => return None,
    })
}
