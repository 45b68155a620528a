//! Whatever is in a file, it is read or refused: no panic, no hang.

use proptest::prelude::*;

use super::users;
use crate::policy::{
    compile::{Loaded, load, load_file},
    directory::policy_path,
    explain::explain,
    written::{BUILT_IN, describe},
};

fn load_bytes(bytes: &[u8]) -> Option<Loaded> {
    let directory = tempfile::tempdir().unwrap();
    let path = policy_path(directory.path(), "p");
    std::fs::write(&path, bytes).unwrap();
    let one = load_file(&path, &users);
    match (load(directory.path(), &users), one) {
        (Ok(loaded), Ok(one)) => {
            assert_eq!(loaded.set, one.set);
            Some(loaded)
        }
        (Err(faults), Err(one)) => {
            assert_eq!(faults, one);
            let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
            for fault in &faults {
                let crate::policy::fault::Place::File { line, column, .. } = fault.place else {
                    panic!("{fault} has no place");
                };
                assert!((1..=lines as u32 + 1).contains(&line) && column >= 1, "{fault}");
                assert!(!fault.to_string().contains(char::is_control), "{fault:?}");
            }
            None
        }
        (Ok(_), Err(faults)) | (Err(faults), Ok(_)) => panic!("they disagree: {faults:?}"),
    }
}

/// Something like a value of something like a key.
fn line() -> impl Strategy<Value = String> {
    let keys: Vec<String> = describe()
        .iter()
        .map(|key| match key.table {
            "" => key.key.to_owned(),
            table => format!("{table}.{}", key.key),
        })
        .chain(["extends".to_owned(), "service.\"a/*\".limits.pids".to_owned()])
        .collect();
    let value = prop_oneof![
        "\"\\PC{0,12}\"",
        "-?[0-9]{1,20}",
        "[0-9.]{1,8}|nan|inf|true|1979-05-27",
        "\"(unlimited|none|host|direct|\\.\\.\\.|[0-9]{1,4}(MiB|ms|s|/s))\"",
        "\\[(\"[a-z*/_.]{0,8}\",){0,4}\\]",
        "\\{ (a = 1|A = \"b\"|source = \"/a\", target = \"/b\") \\}",
    ];
    (proptest::sample::select(keys), value).prop_map(|(key, value)| format!("{key} = {value}\n"))
}

proptest! {
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        load_bytes(&bytes);
    }

    #[test]
    fn any_text(text in "[\\[\\]{}=\"'.,#a-z0-9\\\\ \n]{0,200}") {
        load_bytes(text.as_bytes());
    }

    #[test]
    fn any_keys_and_values(lines in prop::collection::vec(line(), 0..8)) {
        if let Some(loaded) = load_bytes(lines.concat().as_bytes()) {
            let text = explain(&loaded, &"p".parse().unwrap(), None).unwrap();
            let again = load_bytes(text.as_bytes()).expect("what explain prints is a policy");
            prop_assert_eq!(
                again.set.policies["p"].base.digest,
                loaded.set.policies["p"].base.digest
            );
        }
    }

    #[test]
    fn the_defaults_with_a_few_bytes_changed(
        changes in prop::collection::vec((0..BUILT_IN.len(), any::<u8>()), 1..4),
    ) {
        let mut bytes = BUILT_IN.as_bytes().to_vec();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        load_bytes(&bytes);
    }
}

#[test]
fn deep_and_wide_documents_end_in_a_fault() {
    let deep = format!("a = {}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(load_bytes(deep.as_bytes()).is_none());
    let deep = format!("{} = 1", vec!["a"; 100_000].join("."));
    assert!(load_bytes(deep.as_bytes()).is_none());
    let wide: String = (0..50_000).map(|number| format!("k{number} = 1\n")).collect();
    assert!(load_bytes(wide.as_bytes()).is_none());
    let long = format!("mode = \"{}\"", "x".repeat(1_000_000));
    assert!(load_bytes(long.as_bytes()).is_none());
}
