//! Sagas: steps that must not be left half done. Each step's intent is journaled before it runs; a later generation undoes what was begun.
use crate::{Cx, Fault, Result};
use futures::future::{BoxFuture, LocalBoxFuture};
use serde::{Serialize, de::DeserializeOwned};

/// Records of a journal: id and bytes.
pub type Rows = Vec<(String, Vec<u8>)>;

/// Where intents are kept.
pub trait Journal: Send + Sync {
    /// Inserts or replaces; durable when it returns.
    fn put<'a>(&'a self, cx: &'a Cx, id: &'a str, bytes: Vec<u8>) -> BoxFuture<'a, Result<()>>;
    /// Removes.
    fn delete<'a>(&'a self, cx: &'a Cx, id: &'a str) -> BoxFuture<'a, Result<()>>;
    /// All whose id begins with `prefix`.
    fn list<'a>(&'a self, cx: &'a Cx, prefix: &'a str) -> BoxFuture<'a, Result<Rows>>;
}

/// A function of a step.
pub type Act<E, S> = for<'a> fn(&'a E, &'a mut S, Cx) -> LocalBoxFuture<'a, Result<()>>;

/// One step.
pub struct Step<E: 'static, S: 'static> {
    /// Name, shown in ops and traces.
    pub name: &'static str,
    /// Does it.
    pub run: Act<E, S>,
    /// Undoes it; idempotent, and at home with a half-done step.
    pub undo: Act<E, S>,
}

/// A sequence of steps.
pub struct Saga<E: 'static, S: 'static> {
    /// Name: prefix of its journal records.
    pub name: &'static str,
    /// Steps in order.
    pub steps: &'static [Step<E, S>],
}

/// What recovery did with one saga.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All that was begun is undone.
    Undone,
    /// Undoing failed at a step; it stays in the journal.
    Stuck(String),
}

#[derive(Serialize, serde::Deserialize)]
struct Record<S> {
    begun: usize,
    state: S,
}

impl<E, S: Serialize + DeserializeOwned> Saga<E, S> {
    /// Runs all steps. On an error everything begun is undone in reverse order and the error is returned.
    pub async fn run(&self, journal: &dyn Journal, id: &str, env: &E, mut state: S, cx: &Cx) -> Result<S> {
        let key = format!("{}/{id}", self.name);
        for (number, step) in self.steps.iter().enumerate() {
            self.note(journal, &key, number + 1, &state, cx).await?;
            let result = cx.run(step.name, |cx| (step.run)(env, &mut state, cx)).await;
            if let Err(fault) = result {
                let cx = cx.without_deadline();
                self.note(journal, &key, number + 1, &state, &cx).await?;
                return match self.undo(number + 1, env, &mut state, &cx).await {
                    Ok(()) => {
                        journal.delete(&cx, &key).await?;
                        Err(fault.context(step.name))
                    }
                    Err(undo) => Err(fault.context(format!("{} (and undoing it failed: {undo})", step.name))),
                };
            }
        }
        journal.delete(cx, &key).await?;
        Ok(state)
    }

    async fn note(&self, journal: &dyn Journal, key: &str, begun: usize, state: &S, cx: &Cx) -> Result<()> {
        let bytes = serde_json::to_vec(&serde_json::json!({"begun": begun, "state": state})).map_err(|e| Fault::internal(e.to_string()))?;
        journal.put(cx, key, bytes).await
    }

    async fn undo(&self, begun: usize, env: &E, state: &mut S, cx: &Cx) -> Result<()> {
        for step in self.steps[..begun.min(self.steps.len())].iter().rev() {
            cx.run(format!("undo {}", step.name), |cx| (step.undo)(env, state, cx)).await?;
        }
        Ok(())
    }

    /// After a crash: undoes every saga of this name that the journal holds.
    pub async fn recover(&self, journal: &dyn Journal, env: &E, cx: &Cx) -> Result<Vec<(String, Outcome)>> {
        let prefix = format!("{}/", self.name);
        let mut outcomes = Vec::new();
        for (key, bytes) in journal.list(cx, &prefix).await? {
            let mut record: Record<S> = serde_json::from_slice(&bytes).map_err(|e| Fault::data_loss(format!("journal {key}: {e}")))?;
            let outcome = match self.undo(record.begun, env, &mut record.state, cx).await {
                Ok(()) => {
                    journal.delete(cx, &key).await?;
                    Outcome::Undone
                }
                Err(e) => Outcome::Stuck(e.to_string()),
            };
            outcomes.push((key[prefix.len()..].to_owned(), outcome));
        }
        Ok(outcomes)
    }
}
