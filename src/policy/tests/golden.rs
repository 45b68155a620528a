//! What `explain` and `check` print, compared with files in `testdata`.
//!
//! After a change that is meant: `UPDATE_GOLDEN=1 cargo test golden`, and look
//! at the difference.

use std::{fs, path::Path};

use super::users;
use crate::policy::{
    compile::{Loaded, load},
    explain::explain,
};

/// Relative to the package, as tests are run: so that paths in the output are
/// the same everywhere.
const TESTDATA: &str = "src/policy/testdata";

fn loaded() -> Loaded {
    load(&Path::new(TESTDATA).join("good"), &users).unwrap()
}

fn compare(name: &str, text: &str) {
    let path = Path::new(TESTDATA).join("golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "{} differs; see the top of this file", path.display());
}

/// Without what changes with every change of the default profile.
fn stable(text: &str) -> String {
    let mut stable = String::new();
    for line in text.lines() {
        let line = match (line.find("sha256:"), line.find(" system calls allowed")) {
            (Some(at), _) => format!("{}sha256:…", &line[..at]),
            (_, Some(at)) => {
                let start = line[..at].rfind(' ').unwrap();
                format!("{} N{}", &line[..start], &line[at..])
            }
            _ => line.to_owned(),
        };
        stable.push_str(&line);
        stable.push('\n');
    }
    stable
}

fn explained(namespace: &str, call: Option<(&str, &str)>) -> String {
    let call = call.map(|(service, method)| (service.parse().unwrap(), method.parse().unwrap()));
    let call = call.as_ref().map(|(service, method)| (service, method));
    explain(&loaded(), &namespace.parse().unwrap(), call).unwrap()
}

#[test]
fn explain_a_policy() {
    compare("demo.txt", &stable(&explained("demo", None)));
    compare("other.txt", &stable(&explained("other", None)));
    compare("direct.txt", &stable(&explained("direct", None)));
}

#[test]
fn explain_a_method() {
    compare("demo-allowed.txt", &stable(&explained("demo", Some(("greeter.V2", "SayHello")))));
    compare("demo-refused.txt", &stable(&explained("demo", Some(("secret", "Tell")))));
}

#[test]
fn what_explain_prints_is_a_policy_that_means_the_same() {
    let loaded = loaded();
    for (name, family) in &loaded.set.policies {
        let text = explain(&loaded, &name.parse().unwrap(), None).unwrap();
        assert_eq!(super::policy_of(&text).digest, family.base.digest, "{name}");
    }
}

#[test]
fn check_tells_every_fault() {
    let faults = load(&Path::new(TESTDATA).join("bad"), &users).unwrap_err();
    let lines: Vec<String> = faults.iter().map(|fault| format!("{fault}\n")).collect();
    compare("check.txt", &lines.concat());
}
