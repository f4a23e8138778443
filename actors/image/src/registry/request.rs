//! One request: its headers, its redirects, its authorisation, and what its answer means.
use super::{Attempt, MANIFEST_BYTES, RETRY_AFTER, Repository, Way, auth, client, header, redact, text};
use kernel::{Class, Cx, Fault};
use reqwest::{Method, Response, StatusCode, Url};
use std::time::Duration;

/// Redirects of one request, as browsers and containerd have it.
const REDIRECTS: usize = 10;
/// A registry that takes longer for its headers is stuck.
const HEADERS: Duration = Duration::from_secs(30);

/// The same host and port, and not less encrypted: the only place where credentials and configured headers may go.
fn same_origin(to: &Url, first: &Url) -> bool {
    let same_port = (to.scheme(), to.port_or_known_default()) == (first.scheme(), first.port_or_known_default());
    let upgraded = (first.scheme(), first.port(), to.scheme(), to.port()) == ("http", None, "https", None);
    to.host_str() == first.host_str() && (same_port || upgraded)
}

impl Repository {
    /// Asks one host; `range` is a value for the `Range` header.
    pub(super) async fn request(
        &self,
        cx: &Cx,
        way: &Way,
        method: Method,
        path: &str,
        accept: &str,
        range: Option<String>,
    ) -> Result<Response, Attempt> {
        let mut url = Url::parse(&format!("{}/{path}", way.host.base))
            .map_err(|e| Attempt::last(Fault::invalid_argument(format!("{}: {e}", redact(&way.host.base)))))?;
        if way.host.mirror {
            url.query_pairs_mut().append_pair("ns", &self.registry);
        }
        let mut challenged = false;
        loop {
            let response = self.follow(cx, way, &method, url.clone(), accept, range.as_deref()).await?;
            let status = response.status();
            cx.attr("http.response.status_code", status.as_u16());
            if status != StatusCode::UNAUTHORIZED {
                return judge(response);
            }
            if challenged {
                return Err(Attempt::last(Fault::unauthenticated("the registry refuses these credentials")));
            }
            challenged = true;
            let challenges: Vec<String> =
                response.headers().get_all("www-authenticate").iter().filter_map(|v| v.to_str().ok()).map(str::to_owned).collect();
            let token = auth::answer(&way.client, &challenges, &self.name, &way.credentials).await;
            let token = token.map_err(|e| if e.class == Class::Unavailable { Attempt::retry(e) } else { Attempt::last(e) })?;
            self.tokens.lock().insert(way.host.base.clone(), token);
        }
    }

    /// Sends, and follows redirects.
    async fn follow(
        &self,
        cx: &Cx,
        way: &Way,
        method: &Method,
        first: Url,
        accept: &str,
        range: Option<&str>,
    ) -> Result<Response, Attempt> {
        let mut url = first.clone();
        for _ in 0..=REDIRECTS {
            let mut request = way.client.request(method.clone(), url.clone()).header("Accept", accept);
            if let Some(range) = range {
                request = request.header("Range", range);
            }
            if same_origin(&url, &first) {
                request = request.header("traceparent", cx.traceparent());
                for (name, value) in self.config.headers.iter().chain(&way.host.headers) {
                    request = request.header(name, value);
                }
                // A ready token is the registry's; mirrors do not get to see it.
                let ready = || way.credentials.ready().filter(|_| !way.host.mirror);
                let token = self.tokens.lock().get(&way.host.base).cloned().or_else(ready);
                if let Some(token) = token {
                    request = request.header("Authorization", token);
                }
            }
            let limit = self.config.progress_timeout.min(HEADERS);
            let sent = client::run(tokio::time::timeout(limit, request.send())).await.map_err(Attempt::last)?;
            let response = match sent {
                Ok(Ok(response)) => response,
                // A host that cannot be connected to is not asked five times while the next one waits.
                Ok(Err(e)) if e.is_connect() || e.is_builder() => return Err(Attempt::last(Fault::unavailable(text(e)))),
                Ok(Err(e)) => return Err(Attempt::retry(Fault::unavailable(text(e)))),
                Err(_) => return Err(Attempt::retry(Fault::deadline_exceeded(format!("no answer within {limit:?}")))),
            };
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let target = header(&response, "location").and_then(|l| url.join(&l).ok());
            let target = target.filter(|t| matches!(t.scheme(), "http" | "https"));
            url = target.ok_or_else(|| Attempt::last(Fault::unavailable(format!("{} redirects to nowhere", redact(url.as_str())))))?;
        }
        let text = format!("more than {REDIRECTS} redirects, the last one to {}", redact(url.as_str()));
        Err(Attempt::last(Fault::unavailable(text)))
    }

    /// A whole small body.
    pub(super) async fn small(&self, mut response: Response) -> Result<Vec<u8>, Attempt> {
        let limit = self.config.progress_timeout;
        let read = async move {
            let mut all = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(|e| Attempt::retry(Fault::unavailable(text(e))))? {
                all.extend_from_slice(&chunk);
                if all.len() > MANIFEST_BYTES {
                    return Err(Attempt::last(Fault::out_of_range(format!("the manifest is larger than {MANIFEST_BYTES} bytes"))));
                }
            }
            Ok(all)
        };
        let read = client::run(tokio::time::timeout(limit, read)).await.map_err(Attempt::last)?;
        read.unwrap_or_else(|_| Err(Attempt::retry(Fault::deadline_exceeded(format!("not all of the manifest within {limit:?}")))))
    }
}

/// What an answer means.
fn judge(response: Response) -> Result<Response, Attempt> {
    let wait = header(&response, "retry-after").and_then(|v| v.trim().parse().ok()).map(Duration::from_secs);
    match response.status() {
        s if s.is_success() => Ok(response),
        StatusCode::FORBIDDEN => Err(Attempt::last(Fault::permission_denied("403 Forbidden: the registry denies access"))),
        StatusCode::NOT_FOUND => Err(Attempt::last(Fault::not_found("404 Not Found"))),
        StatusCode::METHOD_NOT_ALLOWED => Err(Attempt::last(Fault::unimplemented("405 Method Not Allowed"))),
        StatusCode::TOO_MANY_REQUESTS => {
            let fault = Fault::resource_exhausted("429 Too Many Requests: the registry limits how often it may be asked");
            match wait {
                Some(wait) if wait > RETRY_AFTER => Err(Attempt::last(fault.context(format!("try again in {wait:?}")))),
                wait => Err(Attempt { fault, again: Some(wait), progress: false }),
            }
        }
        s if s.is_server_error() || s == StatusCode::REQUEST_TIMEOUT => {
            Err(Attempt { fault: Fault::unavailable(s.to_string()), again: Some(wait.map(|w| w.min(RETRY_AFTER))), progress: false })
        }
        s => Err(Attempt::last(Fault::unknown(s.to_string()))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn credentials_follow_an_upgrade_and_nothing_else() {
        let same = |to: &str, first: &str| same_origin(&Url::parse(to).unwrap(), &Url::parse(first).unwrap());
        assert!(same("https://h/a", "https://h:443/b") && same("https://h/a", "http://h/a"));
        for (to, first) in [
            ("http://h/", "https://h/"),
            ("https://i/", "https://h/"),
            ("https://h:8443/", "https://h/"),
            ("https://h.evil/", "https://h/"),
        ] {
            assert!(!same(to, first), "{to} {first}");
        }
    }
}
