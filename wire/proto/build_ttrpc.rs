//! The ttrpc glue generator: for a service `Foo`, a module `foo_ttrpc` with `SERVICE`, the trait `Foo`, `serve` and `Client`.

use prost_build::{Method, Service};
use std::fmt::Write as _;

/// Appends the glue of one service.
pub fn generate(service: &Service, out: &mut String) {
    assert!(
        service.methods.iter().all(|m| !m.client_streaming && !m.server_streaming),
        "{}: ttrpc streams are not supported by this generator",
        service.proto_name
    );
    let methods = &service.methods;
    let stubs: String = methods.iter().map(stub).collect();
    let routes: String = methods.iter().map(route).collect();
    let calls: String = methods.iter().map(call).collect();
    let module = snake(&service.name);
    let name = &service.name;
    let full = format!("{}.{}", service.package, service.proto_name);
    let _ = write!(
        out,
        r#"
/// ttrpc glue of `{full}`.
pub mod {module}_ttrpc {{
    use super::*;
    use crate::glue;
    /// The service's name on the wire.
    pub const SERVICE: &str = "{full}";
    /// What a server of the service does; what it does not define answers `UNIMPLEMENTED`.
    #[async_trait::async_trait]
    pub trait {name}: Send + Sync + 'static {{{stubs}}}
    /// Routes of a server, for [`glue::serve`] or ttrpc's own server.
    pub fn serve(server: std::sync::Arc<dyn {name}>) -> glue::Services {{
        serve_as(SERVICE, server)
    }}
    /// The same under another name, for a twin of the service with equal messages.
    pub fn serve_as(service: &str, server: std::sync::Arc<dyn {name}>) -> glue::Services {{
        let mut methods = glue::Methods::new();{routes}
        glue::service(service, methods)
    }}
    /// Client; cheap to clone.
    #[derive(Clone)]
    pub struct Client {{
        inner: ttrpc::r#async::Client,
        service: &'static str,
    }}
    impl Client {{
        /// Over a connection.
        pub fn new(inner: ttrpc::r#async::Client) -> Self {{
            Self {{ inner, service: SERVICE }}
        }}
        /// The same under another name, for a twin of the service with equal messages.
        pub fn named(inner: ttrpc::r#async::Client, service: &'static str) -> Self {{
            Self {{ inner, service }}
        }}{calls}
    }}
}}
"#
    );
}

fn stub(m: &Method) -> String {
    let (name, proto, input, output) = parts(m);
    format!(
        r#"
        /// `{proto}`.
        async fn {name}(&self, cx: &glue::Context, request: {input}) -> ttrpc::Result<{output}> {{
            let _ = (cx, request);
            Err(glue::unimplemented(SERVICE, "{proto}"))
        }}"#
    )
}

fn route(m: &Method) -> String {
    let (name, proto, input, _) = parts(m);
    format!(
        r#"
        {{
            let server = server.clone();
            glue::unary(&mut methods, "{proto}", move |cx, request: {input}| {{
                let server = server.clone();
                Box::pin(async move {{ server.{name}(&cx, request).await }})
            }});
        }}"#
    )
}

fn call(m: &Method) -> String {
    let (name, proto, input, output) = parts(m);
    format!(
        r#"
        /// Calls `{proto}`.
        pub async fn {name}(&self, cx: ttrpc::context::Context, request: &{input}) -> ttrpc::Result<{output}> {{
            glue::call(&self.inner, cx, self.service, "{proto}", request).await
        }}"#
    )
}

/// Method name, its wire name, request type and answer type as seen from a module one deeper than the package's.
fn parts(m: &Method) -> (&str, &str, String, String) {
    (&m.name, &m.proto_name, deeper(&m.input_type), deeper(&m.output_type))
}

fn deeper(path: &str) -> String {
    if path.starts_with("super::") { format!("super::{path}") } else { path.to_owned() }
}

fn snake(name: &str) -> String {
    let mut out = String::new();
    for (i, c) in name.chars().enumerate() {
        if c.is_uppercase() && i > 0 {
            out.push('_');
        }
        out.extend(c.to_lowercase());
    }
    out
}
