//! The supervisor of a shim: adopts it after a start of the daemon or a crash of the child, and tells up from deaf from gone.
//!
//! One background operation `shim.watch` for each pod. Its step says how the shim is, which `troupe ops` shows.
use crate::bundle;
use crate::container::from_state;
use crate::link::{Link, is_silence};
use crate::pod::{Pod, State};
use crate::process::{self, Process};
use kernel::Cx;
use proto::types::Status;
use std::rc::Rc;
use std::time::Duration;

/// First pause between probes of a deaf shim, doubled up to the last.
const FIRST: Duration = Duration::from_millis(250);
const LAST: Duration = Duration::from_secs(15);

/// Starts the supervisor. `adopt`: the shim was started by another generation.
pub fn supervise(pod: &Rc<Pod>, cx: &Cx, adopt: bool) {
    let pod = pod.clone();
    cx.spawn("shim.watch", move |cx| async move {
        follow_log(&pod, &cx);
        let mut connected = !adopt || connect(&pod, &cx).await;
        while connected {
            cx.step("up");
            let ended = shim_ended(&pod);
            tokio::select! {
                () = ended => {
                    gone(&pod, &cx, "its process ended").await;
                    connected = false;
                }
                () = pod.suspect.notified() => connected = examine(&pod, &cx).await,
            }
        }
    });
}

async fn shim_ended(pod: &Pod) {
    match Process::open(pod.shim_pid.get()) {
        Ok(p) => p.ended().await,
        Err(f) if f.is_not_found() && pod.shim_pid.get() != 0 => {}
        Err(_) => std::future::pending().await,
    }
}

async fn gone(pod: &Pod, cx: &Cx, why: &str) {
    if pod.removing.get() || pod.is_gone() {
        return;
    }
    cx.step(format!("gone: {why}"));
    tracing::warn!(sandbox = pod.id, why, "the shim is gone");
    pod.state.send_replace(State::Gone(why.to_owned()));
    pod.lose_all(cx).await;
}

/// A call was not answered, or the connection ended. `false`: the shim is gone.
async fn examine(pod: &Rc<Pod>, cx: &Cx) -> bool {
    let State::Up(mut link) = pod.state.borrow().clone() else { return !pod.is_gone() };
    match link.hello(cx, &pod.id, pod.args.timeouts.probe).await {
        Ok(_) => true,
        Err(f) if is_silence(&f) => endure(pod, cx, link).await,
        Err(_) => {
            // Its end explains a lost connection; it may be a moment away.
            let dead = tokio::time::timeout(Duration::from_millis(500), shim_ended(pod)).await.is_ok();
            if dead {
                gone(pod, cx, "its process ended").await;
                return false;
            }
            pod.state.send_replace(State::Connecting);
            connect(pod, cx).await
        }
    }
}

/// Waits until a deaf shim answers again. `false`: it is gone.
async fn endure(pod: &Rc<Pod>, cx: &Cx, mut link: Link) -> bool {
    let since = std::time::Instant::now();
    let mut pause = FIRST;
    let why = "it does not answer Task/Connect";
    tracing::warn!(sandbox = pod.id, "the shim is deaf");
    pod.state.send_replace(State::Deaf(why.to_owned()));
    // Their ends are seen all the same.
    let running: Vec<_> = pod.containers.borrow().values().cloned().collect();
    running.iter().for_each(|c| pod.watch(cx, &link, c));
    loop {
        cx.step(format!("deaf for {:?}: {why}; next try in {pause:?}", since.elapsed()));
        tokio::select! {
            () = shim_ended(pod) => {
                gone(pod, cx, "its process ended").await;
                return false;
            }
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LAST);
        match link.hello(cx, &pod.id, pod.args.timeouts.probe).await {
            Ok(_) => {
                tracing::info!(sandbox = pod.id, "the shim answers again");
                take_over(pod, cx, link).await;
                return true;
            }
            Err(f) if is_silence(&f) => {}
            Err(_) => return Box::pin(connect(pod, cx)).await,
        }
    }
}

/// Connects to a shim that another generation started. `false`: it is gone.
async fn connect(pod: &Rc<Pod>, cx: &Cx) -> bool {
    let mut pause = FIRST;
    loop {
        cx.step("connecting");
        if pod.removing.get() {
            return false;
        }
        let Some(endpoint) = bundle::read_endpoint(&pod.bundle()) else {
            gone(pod, cx, "its bundle is gone or has no address").await;
            return false;
        };
        let known = std::fs::read_to_string(pod.bundle().join("shim.pid")).ok();
        let alive = known.as_deref().and_then(process::from_stamp);
        if let Some((pid, _)) = &alive {
            pod.shim_pid.set(*pid);
        }
        for c in pod.containers.borrow().values().filter(|c| c.pid.get() == 0) {
            let stamp = std::fs::read_to_string(pod.bundle_of(&c.id).join("created")).unwrap_or_default();
            c.pid.set(process::from_stamp(&stamp).map_or(0, |(pid, _)| pid));
        }
        let link = cx.run("shim.connect", |_| Link::connect(&endpoint, pod.args.timeouts.load)).await;
        let why = match link {
            Ok(mut link) => match link.hello(cx, &pod.id, pod.args.timeouts.load).await {
                Ok(hello) => {
                    pod.shim_pid.set(hello.shim_pid);
                    take_over(pod, cx, link).await;
                    return true;
                }
                Err(f) if is_silence(&f) => return Box::pin(endure(pod, cx, link)).await,
                Err(f) => f,
            },
            Err(f) => f,
        };
        if alive.is_none() {
            gone(pod, cx, &why.message).await;
            return false;
        }
        pod.state.send_replace(State::Deaf(why.message.clone()));
        cx.step(format!("deaf: {why}; next try in {pause:?}"));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST);
    }
}

/// The shim answers: undoes what was begun and not finished, picks up the ends that happened meanwhile, watches the rest.
async fn take_over(pod: &Rc<Pod>, cx: &Cx, link: Link) {
    // Nobody is let in before the undo: a retry of the create would meet what is being removed.
    pod.sweep_execs(cx, &link);
    for id in unfinished(pod) {
        match cx
            .run("task.undo", |cx| async {
                let cx = cx;
                pod.undo_create(&cx, &link, &id).await
            })
            .await
        {
            Ok(()) => drop(pod.containers.borrow_mut().remove(&id)),
            Err(e) => tracing::warn!(sandbox = pod.id, error = %e, "undo of an unfinished create is incomplete"),
        }
    }
    pod.state.send_replace(State::Up(link.clone()));
    let known: Vec<_> =
        pod.containers.borrow().values().filter(|c| c.ended().is_none() && !pod.creating.borrow().contains(&c.id)).cloned().collect();
    let asked = known.into_iter().map(|c| {
        let link = &link;
        async move {
            match pod.ask_state(cx, link, &c.id).await {
                Ok(s) if s.status() == Status::Stopped => {
                    c.settle(from_state(&s, &c));
                    pod.announce_later(cx, &c);
                }
                Ok(s) => {
                    c.pid.set(s.pid);
                    pod.watch(cx, link, &c);
                }
                Err(f) if f.is_not_found() => pod.lose(cx, &c, lost()).await,
                Err(_) => pod.suspect.notify_one(),
            }
        }
    });
    futures::future::join_all(asked).await;
}

fn lost() -> messages::task::Exit {
    messages::task::Exit { code: 255, at_ns: crate::container::nanos(None), oom: false, witness: "lost".into() }
}

/// Containers of the pod whose `Create` did not finish, by their bundles.
fn unfinished(pod: &Pod) -> Vec<String> {
    let mut found = bundle::of_pod(&pod.args, &pod.id);
    let done = |id: &String| pod.bundle_of(id).join("created").exists() && pod.row.borrow().containers.contains_key(id);
    found.retain(|id| !done(id) && !pod.creating.borrow().contains(id));
    found
}

/// Shims of other makes write their log into a FIFO of the bundle; its lines become ours.
fn follow_log(pod: &Rc<Pod>, cx: &Cx) {
    use tokio::io::AsyncReadExt;
    let path = pod.bundle().join("log");
    // Read-write: no end of file when the shim closes it, and the shim never waits for us.
    let Ok(mut pipe) = tokio::net::unix::pipe::OpenOptions::new().read_write(true).open_receiver(&path) else { return };
    let pod = pod.clone();
    cx.spawn("shim.log", move |_| async move {
        let mut buffer = vec![0; 4096];
        while let Ok(n) = pipe.read(&mut buffer).await {
            for line in String::from_utf8_lossy(&buffer[..n]).lines() {
                tracing::info!(sandbox = pod.id, "shim: {line}");
            }
        }
    });
}
