//! Making and removing, with a Docker that doesn't do as it should.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::{
    engine::EngineError,
    fake::{Answer, Asked, FakeDocker, until},
    make::{Maker, Order},
    owner::OWNER,
};
use crate::jail::message::Refusal;

async fn refused(maker: &Arc<Maker>, namespace: &str) -> Refusal {
    let ready = maker.prepare(Order::of(namespace)).await.unwrap();
    match maker.make(ready).await {
        Ok(_) => panic!("it was made"),
        Err(refusal) => refusal,
    }
}

fn slots(docker: &FakeDocker) -> usize {
    let own = std::fs::read_dir(docker.slots()).unwrap().next().unwrap().unwrap();
    std::fs::read_dir(own.path()).unwrap().count()
}

fn missing(what: &str) -> Answer {
    Answer::Now(404, json!({ "message": format!("No such {what}") }))
}

/// A container as Docker lists it.
fn listed(created: &Asked) -> Value {
    let name = created.body["name"].as_str().unwrap();
    json!({ "Id": format!("id-of-{name}"), "Names": [format!("/{name}")], "Labels": created.body["Labels"] })
}

/// Docker may finish what it was asked for long after it was given up, and have said before
/// that there is no such container.
#[tokio::test]
async fn what_docker_makes_too_late_is_removed() {
    let late = Arc::new(Mutex::new(None::<Value>));
    let docker = {
        let late = Arc::clone(&late);
        FakeDocker::start(move |asked, _| match &*asked.what {
            "POST /containers/create" => Answer::Never,
            "GET /containers/json" => {
                Answer::Now(200, Value::from_iter(late.lock().unwrap().clone()))
            }
            what if what.starts_with("DELETE /containers/id-of-") => {
                late.lock().unwrap().take();
                Answer::Now(204, Value::Null)
            }
            what if what.contains("/containers/") => missing("container"),
            _ => Answer::Now(200, json!({})),
        })
    };
    let maker = docker.maker();
    assert!(!maker.inventory().is_in_doubt());
    let refusal = refused(&maker, "a").await;
    assert!(matches!(refusal, Refusal::DockerUnavailable { .. }), "{refusal:?}");
    until("it is looked for", || !docker.asked("DELETE /containers/dispatcher-made-").is_empty())
        .await;
    assert!(maker.inventory().is_in_doubt(), "it is swept for soon");
    // As nobody waits for that removal any more.
    let inventory = maker.inventory();
    tokio::time::timeout(std::time::Duration::from_secs(20), inventory.emptied())
        .await
        .expect("that Docker has none such ends its removal")
        .unwrap();
    *late.lock().unwrap() = Some(listed(&docker.asked("POST /containers/create")[0]));
    inventory.sweep().await.unwrap();
    assert!(late.lock().unwrap().is_none(), "it was removed");

    // At the end as well.
    *late.lock().unwrap() = Some(listed(&docker.asked("POST /containers/create")[0]));
    maker.close();
    assert!(maker.all_removed().await);
    assert!(late.lock().unwrap().is_none(), "it was removed");
}

/// What is being made, others' who live, and what isn't ours.
#[tokio::test]
async fn only_leftovers_are_swept() {
    let known = Arc::new(Mutex::new(Vec::<Value>::new()));
    let docker = {
        let known = Arc::clone(&known);
        FakeDocker::start(move |asked, _| match &*asked.what {
            "GET /containers/json" => Answer::Now(200, Value::Array(known.lock().unwrap().clone())),
            "POST /containers/create" => {
                known.lock().unwrap().push(listed(asked));
                Answer::Never
            }
            what if what.starts_with("DELETE ") => Answer::Now(204, Value::Null),
            what if what.contains("/containers/") => missing("container"),
            _ => Answer::Now(200, json!({})),
        })
    };
    let maker = docker.patient_maker();
    let making = {
        let maker = Arc::clone(&maker);
        tokio::spawn(async move { refused(&maker, "a").await })
    };
    until("it is being made", || !known.lock().unwrap().is_empty()).await;
    let own = maker.inventory().owner().label();
    let mut parts: Vec<_> = own.split('/').map(str::to_owned).collect();
    parts[2] = std::os::unix::process::parent_id().to_string();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", parts[2])).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    parts[3] = fields.split_whitespace().nth(19).unwrap().to_owned();
    let living = parts.join("/");
    parts[3].push('1');
    let dead = parts.join("/");
    for (id, owner) in
        [("living", &*living), ("dead", &*dead), ("odd", "whatever"), ("late", &*own)]
    {
        let one = json!({ "Id": id, "Names": [format!("/{id}")], "Labels": { OWNER: owner } });
        known.lock().unwrap().push(one);
    }
    maker.inventory().sweep().await.unwrap();
    let removed: Vec<_> = docker.asked("DELETE ").into_iter().map(|asked| asked.what).collect();
    assert_eq!(removed, ["DELETE /containers/dead", "DELETE /containers/late"]);
    making.abort();
}

#[tokio::test]
async fn an_image_of_ours_that_was_removed_meanwhile_is_imported_again() {
    let docker = FakeDocker::start(|asked, before| match &*asked.what {
        "POST /containers/create" if before == 0 => missing("image"),
        "POST /containers/create" => {
            Answer::Now(409, json!({ "message": "as far as it should get" }))
        }
        what if what.starts_with("GET /images/") && before > 0 => missing("image"),
        what if what.starts_with("DELETE ") => missing("container"),
        _ => Answer::Now(200, json!({})),
    });
    let refusal = refused(&docker.maker(), "a").await;
    let Refusal::Docker { why } = refusal else { panic!("{refusal:?}") };
    assert!(why.contains("as far as it should get"), "{why}");
    assert_eq!(docker.asked("POST /images/create").len(), 1);
    assert_eq!(docker.asked("POST /containers/create").len(), 2);
    until("nothing is left", || slots(&docker) == 0).await;
}

/// Again and again would be for ever.
#[tokio::test]
async fn an_image_that_cannot_be_kept_is_imported_once() {
    let docker = FakeDocker::start(|asked, _| match &*asked.what {
        "POST /containers/create" => missing("image"),
        what if what.starts_with("DELETE ") => missing("container"),
        _ => Answer::Now(200, json!({})),
    });
    let refusal = refused(&docker.maker(), "a").await;
    assert!(matches!(refusal, Refusal::Docker { .. }), "{refusal:?}");
    assert_eq!(docker.asked("POST /containers/create").len(), 2);
}

/// Of several calls under one policy the first has it pulled; what never ends is given up,
/// and the next call tries again.
#[tokio::test]
async fn a_pull_that_gets_no_further_is_given_up() {
    let docker = FakeDocker::start(|asked, before| match &*asked.what {
        "POST /images/create" if before == 0 => Answer::Never,
        "POST /images/create" => Answer::Half(200, json!({ "status": "Downloading" })),
        _ => missing("image"),
    });
    let maker = docker.maker();
    let mut order = Order::of("a");
    let template = Arc::make_mut(&mut order.template);
    (template.container.image, template.container.pull) = ("registry.invalid/some".into(), true);
    let pulls = || docker.asked("POST /images/create").len();
    for attempt in 1..=2 {
        let refusal = maker.prepare(order.clone()).await.err().unwrap();
        let Refusal::Image { why } = refusal else { panic!("{refusal:?}") };
        assert!(why.contains("can't be pulled: "), "{why}");
        assert_eq!(pulls(), attempt);
    }
}

#[tokio::test]
async fn a_docker_on_its_way_down_or_up_is_told_from_one_that_refuses() {
    for (status, message, pings, is_there) in [
        (409, "in use", 503, true),
        (500, "runc: no such file", 200, true),
        (500, "runc: no such file", 500, false),
        (500, "dial unix /run/containerd/containerd.sock: connect: connection refused", 200, false),
        (500, "error reading from server: EOF: unavailable", 200, false),
        (500, "context canceled", 200, false),
        (503, "shutting down", 200, false),
    ] {
        let docker = FakeDocker::start(move |asked, _| match &*asked.what {
            "GET /_ping" => Answer::Now(pings, Value::Null),
            _ => Answer::Now(status, json!({ "message": message })),
        });
        let error = docker.engine().start("some").await.unwrap_err();
        let refused = matches!(error, EngineError::Refused(_));
        assert_eq!(refused, is_there, "{status} {message}, ping {pings}: {error}");
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[tokio::test]
async fn half_an_answer_is_not_waited_for_for_ever() {
    let docker = FakeDocker::start(|_, _| Answer::Half(200, json!({})));
    let error = docker.engine().inspect("some").await.unwrap_err();
    assert!(matches!(error, EngineError::Unavailable { .. }), "{error}");
}
