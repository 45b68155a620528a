//! What is remembered of groups.

use super::*;
use crate::testing;

fn group(groups: &mut HashMap<Key, Arc<Group>>, namespace: &str, number: usize) -> Arc<Group> {
    let key = Key {
        namespace: namespace.parse().unwrap(),
        policy: (TemplateId { policy: "p".into(), variant: 0 }, Digest::of(b"p")),
        artifact: Digest::of(number.to_string().as_bytes()),
    };
    let rules = testing::policy(namespace).instances;
    let group = Arc::new(Group::new(key.clone(), rules, false));
    groups.insert(key, Arc::clone(&group));
    group
}

/// Who has the most that crash loses what is known of them; others keep theirs.
#[tokio::test(start_paused = true)]
async fn one_namespace_does_not_fill_the_table_with_what_crashes() {
    let (mut groups, now) = (HashMap::new(), Instant::now());
    group(&mut groups, "rested", 0);
    let held = group(&mut groups, "offender", 0);
    for number in 1..100 {
        group(&mut groups, "offender", number).back_off();
    }
    group(&mut groups, "victim", 0).back_off();
    forget(&mut groups, now);
    assert_eq!(groups.len(), 101, "there was one of which nothing is lost");
    assert!(groups.keys().all(|key| key.namespace.as_str() != "rested"));
    forget(&mut groups, now);
    let mut left: Vec<_> = groups.keys().map(|key| key.namespace.as_str()).collect();
    left.sort_unstable();
    assert_eq!(left, ["offender", "victim"], "one is in use");
    drop(held);
}
