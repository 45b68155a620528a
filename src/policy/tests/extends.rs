//! `extends`: chains, circles, merging, and where each value comes from.

use super::load_files;
use crate::{
    jail::{
        plan::{Control, Mode},
        seccomp::syscalls,
    },
    policy::profile,
    units::Limit,
};

#[test]
fn tables_merge_key_by_key_and_lists_are_replaced() {
    let loaded = load_files(&[
        (
            "base.toml",
            "best_effort = [\"groups\"]\n[limits]\npids = 7\nmemory = \"8MiB\"\n\
             [environment]\nset = { A = \"base\", B = \"base\" }\nallow = [\"X\"]\n\
             [services]\nallow = [\"a/*\"]\n",
        ),
        (
            "child.toml",
            "extends = \"base\"\nbest_effort = [\"seccomp\", \"...\", \"rlimits\"]\n\
             [limits]\nmemory = \"16MiB\"\n\
             [environment]\nset = { B = \"child\" }\nallow = [\"Y\"]\n\
             [services]\nallow = [\"...\", \"b/*\"]\n",
        ),
    ])
    .unwrap();
    let child = &loaded.set.policies["child"].base;
    assert_eq!(child.limits.pids, Limit::At(7));
    assert_eq!(child.limits.memory, Limit::At(16 << 20));
    assert_eq!(child.best_effort, [Control::Seccomp, Control::Groups, Control::Rlimits]);
    assert_eq!(child.environment["A"], "base");
    assert_eq!(child.environment["B"], "child");
    assert_eq!(child.environment["HOME"], "/tmp");
    assert_eq!(child.environment_allow, ["Y"]);
    assert_eq!(child.services, ["a/*", "b/*"]);
    let effective = &loaded.effective["child"];
    assert_eq!(effective.chain, ["child", "base"]);
    assert!(effective.resolved.limits.pids.place.to_string().ends_with("base.toml:3"));
    assert!(effective.resolved.limits.memory.place.to_string().ends_with("child.toml:4"));
    assert_eq!(effective.resolved.limits.swap.place.to_string(), "built-in");
}

#[test]
fn without_extends_a_file_starts_from_the_built_in_defaults() {
    let loaded =
        load_files(&[("default.toml", "[limits]\npids = 7\n"), ("demo.toml", "")]).unwrap();
    assert_eq!(loaded.set.policies["demo"].base.limits.pids, Limit::At(256));
}

#[test]
fn the_inherited_list_of_the_outermost_file_is_the_built_in_one() {
    let loaded = load_files(&[("p.toml", "best_effort = [\"...\", \"groups\"]\n")]).unwrap();
    let expected = [Control::Landlock(0), Control::MemfdNoexec, Control::Groups];
    assert_eq!(loaded.set.policies["p"].base.best_effort, expected);
}

#[test]
fn overrides_are_inherited_and_merged_by_glob() {
    let loaded = load_files(&[
        (
            "base.toml",
            "[limits]\npids = 7\n[service.\"a/*\"]\nlimits = { pids = 8, open_files = 9 }\n\
             [service.\"b/*\"]\noutput = \"any\"\n",
        ),
        (
            "child.toml",
            "extends = \"base\"\nargv = \"plain\"\n[limits]\npids = 10\n\
             [service.\"c/*\"]\noutput = \"bytes\"\n[service.\"a/*\"]\nlimits = { open_files = 11 }\n",
        ),
    ])
    .unwrap();
    let family = &loaded.set.policies["child"];
    let globs: Vec<&str> = family.overrides.iter().map(|(glob, _)| glob.as_str()).collect();
    assert_eq!(globs, ["a/*", "b/*", "c/*"]);
    let variants: Vec<u32> = family.overrides.iter().map(|(_, policy)| policy.id.variant).collect();
    assert_eq!(variants, [1, 2, 3]);
    let (_, first) = &family.overrides[0];
    assert_eq!(first.limits.pids, Limit::At(8));
    assert_eq!(first.limits.open_files, Limit::At(11));
    assert_eq!(family.overrides[1].1.limits.pids, Limit::At(10));
    assert_eq!(first.argv, crate::policy::Argv::Plain);
}

#[test]
fn circles_are_told_once_per_member() {
    let faults = load_files(&[
        ("a.toml", "extends = \"b\"\n"),
        ("b.toml", "extends = \"c\"\n"),
        ("c.toml", "\nextends = \"b\"\n"),
        ("self.toml", "extends = \"self\"\n"),
    ])
    .unwrap_err();
    assert_eq!(
        faults,
        [
            "b.toml:1:11: extends goes in a circle: b -> c -> b; leave out one extends of it",
            "c.toml:2:11: extends goes in a circle: c -> b -> c; leave out one extends of it",
            "self.toml:1:11: extends goes in a circle: self -> self; leave out one extends of it",
        ]
    );
}

#[test]
fn a_missing_or_faulty_ancestor_is_told_where_it_is_wrong() {
    let faults = load_files(&[
        ("a.toml", "extends = \"bsae\"\n"),
        ("base.toml", "mode = \n"),
        ("child.toml", "extends = \"base\"\n[limits]\npids = 0\n"),
        ("grandchild.toml", "extends = \"a\"\n"),
    ])
    .unwrap_err();
    assert_eq!(faults.len(), 3, "{faults:#?}");
    assert_eq!(
        faults[0],
        "a.toml:1:11: extends is \"bsae\", and there is no bsae.toml; did you mean \"base\"?"
    );
    assert!(faults[1].starts_with("base.toml:1:8: not valid TOML"), "{faults:#?}");
    assert!(faults[2].starts_with("child.toml:3:8: limits.pids is 0"), "{faults:#?}");
}

#[test]
fn chains_are_bounded() {
    let files: Vec<(String, String)> = (0..17)
        .map(|number| match number {
            0 => ("p0.toml".to_owned(), String::new()),
            _ => (format!("p{number}.toml"), format!("extends = \"p{}\"", number - 1)),
        })
        .collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    assert!(load_files(&files[..16]).is_ok());
    let faults = load_files(&files).unwrap_err();
    assert_eq!(faults.len(), 1, "{faults:#?}");
    assert!(faults[0].starts_with("p16.toml:1:11: extends leads through more than 16 files; "));
}

#[test]
fn a_fault_that_is_inherited_is_told_once() {
    let faults = load_files(&[
        ("base.toml", "mode = \"direct\"\n[filesystem]\nroot = \"host\"\n"),
        ("one.toml", "extends = \"base\"\n"),
        ("two.toml", "extends = \"base\"\n"),
    ])
    .unwrap_err();
    assert_eq!(faults.len(), 1, "{faults:#?}");
}

#[test]
fn a_contradiction_across_files_is_told_in_the_file_that_makes_it() {
    let base = ("base.toml", "[filesystem]\nroot = \"host\"\n[seccomp]\nallow = [\"socket\"]\n");
    let child = ("child.toml", "extends = \"base\"\nmode = \"direct\"\n");
    let faults = load_files(&[base, child]).unwrap_err();
    assert_eq!(faults.len(), 2, "{faults:#?}");
    for (fault, key) in faults.iter().zip(["filesystem.root", "seccomp.allow"]) {
        let begin =
            format!("child.toml:2:8: mode is \"direct\", which can't honour {key} (set at ");
        assert!(fault.starts_with(&begin), "{fault}");
    }
    let child = ("child.toml", "extends = \"base\"\n[seccomp]\ndeny = [\"socket\"]\n");
    let loaded = load_files(&[base, child]).unwrap();
    let calls = &loaded.set.policies["child"].base.syscalls.allowed;
    assert!(!calls.contains_key(&syscalls::number("socket").unwrap()));
    assert_eq!(loaded.set.policies["child"].base.mode, Mode::Jail);
}

/// `getpid` with this many values of its first argument, and all else that is harmless.
fn large_profile(values: u32) -> String {
    let rule = |value| {
        format!(
            "{{\"names\": [\"getpid\"], \"action\": \"SCMP_ACT_ALLOW\", \
             \"args\": [{{\"index\": 0, \"value\": {value}, \"op\": \"SCMP_CMP_EQ\"}}]}}"
        )
    };
    let mut rules: Vec<_> = (0..values).map(rule).collect();
    let names: Vec<_> = harmless().iter().map(|name| format!("{name:?}")).collect();
    let names = names.join(", ");
    rules.push(format!("{{\"names\": [{names}], \"action\": \"SCMP_ACT_ALLOW\"}}"));
    let rules = rules.join(", ");
    format!("{{\"defaultAction\": \"SCMP_ACT_ERRNO\", \"syscalls\": [{rules}]}}")
}

fn harmless() -> Vec<&'static str> {
    let calls = crate::jail::seccomp::profile::default_profile().allowed;
    let names = calls.keys().filter_map(|&number| syscalls::name(number));
    names.filter(|name| *name != "getpid").collect()
}

/// As the launcher will have it, with `allow` and `deny`: found here, not there.
#[test]
fn a_filter_that_the_kernel_would_not_take_is_a_fault() {
    let fits = |values| profile::parse(&large_profile(values)).is_ok();
    let (mut most, mut too_many) = (1, 4096);
    assert!(fits(most) && !fits(too_many));
    while too_many - most > 1 {
        let middle = most.midpoint(too_many);
        *(if fits(middle) { &mut most } else { &mut too_many }) = middle;
    }
    let large = large_profile(most);
    let profile = ("seccomp/large.json", large.as_str());
    let alone = ("p.toml", "[seccomp]\nprofile = \"large\"\n");
    load_files(&[alone, profile]).unwrap();
    // Every second call gone: twice as many ranges to search.
    let deny: Vec<_> = harmless().into_iter().step_by(2).collect();
    let less = format!("[seccomp]\nprofile = \"large\"\ndeny = {deny:?}\n");
    let faults = load_files(&[("p.toml", &less), profile]).unwrap_err();
    assert_eq!(faults.len(), 1, "{faults:#?}");
    assert!(faults[0].starts_with("p.toml:2:"), "{faults:#?}");
    assert!(faults[0].contains("too many conditions"), "{faults:#?}");
}

#[test]
fn profiles_lie_beside_the_policies() {
    let policy = ("p.toml", "[seccomp]\nprofile = \"web\"\nallow = [\"socket\"]\n");
    let faults = load_files(&[policy, ("seccomp/web.json", "[\n \"no profile\"")]).unwrap_err();
    assert_eq!(faults.len(), 1, "{faults:#?}");
    assert!(faults[0].starts_with("seccomp/web.json:2:13: "), "{faults:#?}");
    let both = [policy, ("q.toml", policy.1), ("seccomp/web.json", "[\n \"no profile\"")];
    assert_eq!(load_files(&both).unwrap_err(), faults, "told once");
}
