//! Handlers that run to their ends. ttrpc drops a handler in the middle of its work when its caller's time is over or the connection ends (the daemon
//! was killed); whoever asks next would meet a half that nobody knows.
use proto::async_trait;
use proto::glue::{Context, Services, fault};
use proto::ttrpc::r#async::{MethodHandler, Service};
use proto::ttrpc::{Code, Request, Response, Result};
use std::sync::Arc;

struct Whole(Arc<dyn MethodHandler + Send + Sync>);

#[async_trait]
impl MethodHandler for Whole {
    async fn handler(&self, cx: Context, request: Request) -> Result<Response> {
        let method = self.0.clone();
        let answer = tokio::spawn(async move { method.handler(cx, request).await });
        answer.await.unwrap_or_else(|e| Err(fault(Code::INTERNAL, e)))
    }
}

/// The same services, so guarded. Methods in `but` only wait, which is over when nobody wants to know.
pub fn whole(services: Services, but: &[&str]) -> Services {
    let guard = |(name, method): (String, Box<dyn MethodHandler + Send + Sync>)| {
        let method = if but.contains(&name.as_str()) { method } else { Box::new(Whole(method.into())) };
        (name, method)
    };
    let each = |(name, s): (String, Service)| (name, Service { methods: s.methods.into_iter().map(guard).collect(), ..s });
    services.into_iter().map(each).collect()
}
