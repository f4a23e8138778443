//! Puts prost messages on the ttrpc crate's own envelope. The generated `*_ttrpc` modules call these few functions.
//!
//! ttrpc itself does not catch a panic of a handler (its caller would wait for ever), so [`unary`] does, and answers `INTERNAL`.

use async_trait::async_trait;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use prost::Message;
use std::any::Any;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::error::get_rpc_status;
use ttrpc::{Code, Error, Request, Response, Result, get_status};

/// What a server knows of a call besides the request: `metadata`, `timeout_nano`.
pub type Context = TtrpcContext;
/// Services by their names: what a ttrpc server registers. Maps of several services may be merged with `extend`.
pub type Services = HashMap<String, Service>;
/// Handlers by the name of their method.
pub type Methods = HashMap<String, Box<dyn MethodHandler + Send + Sync>>;

/// First value of a metadata key of a call.
pub fn metadata<'a>(cx: &'a Context, key: &str) -> Option<&'a str> {
    cx.metadata.get(key)?.first().map(String::as_str)
}

/// A failed call, with its code.
pub fn fault(code: Code, message: impl ToString) -> Error {
    get_rpc_status(code, message)
}

/// Code and text of an error: a status as it came; a connection that ended is `UNAVAILABLE`.
pub fn status(error: &Error) -> (Code, String) {
    match error {
        Error::RpcStatus(s) => (s.code.enum_value_or(Code::UNKNOWN), s.message.clone()),
        Error::Socket(_) | Error::LocalClosed | Error::RemoteClosed | Error::Eof => (Code::UNAVAILABLE, error.to_string()),
        other => (Code::UNKNOWN, other.to_string()),
    }
}

/// The answer of a method that the server does not define.
pub fn unimplemented(service: &str, method: &str) -> Error {
    fault(Code::UNIMPLEMENTED, format!("{service}/{method} is not implemented"))
}

/// One service of the given methods.
pub fn service(name: &str, methods: Methods) -> Services {
    HashMap::from([(name.to_owned(), Service { methods, streams: HashMap::new() })])
}

/// Adds the handler of a unary method.
pub fn unary<Q, P, F>(methods: &mut Methods, name: &str, handler: F)
where
    Q: Message + Default + 'static,
    P: Message + 'static,
    F: Fn(Context, Q) -> BoxFuture<'static, Result<P>> + Send + Sync + 'static,
{
    let bytes = move |cx: Context, payload: &[u8]| -> BoxFuture<'static, Result<Vec<u8>>> {
        match decode::<Q>(payload) {
            Ok(request) => {
                let answer = handler(cx, request);
                Box::pin(async move { answer.await.map(|m| m.encode_to_vec()) })
            }
            Err(e) => Box::pin(async move { Err(e) }),
        }
    };
    methods.insert(name.to_owned(), Box::new(Unary(Box::new(bytes))));
}

/// Calls a unary method.
pub async fn call<Q: Message, P: Message + Default>(
    client: &ttrpc::r#async::Client,
    cx: ttrpc::context::Context,
    service: &str,
    method: &str,
    request: &Q,
) -> Result<P> {
    let mut envelope = Request::new();
    envelope.service = service.to_owned();
    envelope.method = method.to_owned();
    envelope.timeout_nano = cx.timeout_nano;
    envelope.metadata = ttrpc::context::to_pb(cx.metadata);
    envelope.payload = request.encode_to_vec();
    decode(&client.request(envelope).await?.payload)
}

type Bytes = Box<dyn Fn(Context, &[u8]) -> BoxFuture<'static, Result<Vec<u8>>> + Send + Sync>;

/// A method from bytes to bytes.
struct Unary(Bytes);

#[async_trait]
impl MethodHandler for Unary {
    async fn handler(&self, cx: TtrpcContext, request: Request) -> Result<Response> {
        let answer = AssertUnwindSafe(async { (self.0)(cx, &request.payload).await });
        let answer = match answer.catch_unwind().await {
            Ok(answer) => answer,
            Err(panic) => Err(fault(Code::INTERNAL, format!("{}/{} panicked: {}", request.service, request.method, text(&*panic)))),
        };
        Ok(respond(answer))
    }
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M> {
    M::decode(bytes).map_err(|e| fault(Code::INVALID_ARGUMENT, e))
}

fn respond(answer: Result<Vec<u8>>) -> Response {
    let mut response = Response::new();
    match answer {
        Ok(payload) => {
            response.set_status(get_status(Code::OK, ""));
            response.payload = payload;
        }
        Err(Error::RpcStatus(status)) => response.set_status(status),
        Err(other) => response.set_status(get_status(Code::UNKNOWN, other)),
    }
    response
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&'static str>().copied();
    literal.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
