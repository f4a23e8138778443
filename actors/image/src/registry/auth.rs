//! Answering a registry's 401: basic credentials and bearer tokens (`contracts/core.md` §7.5). No secret ever gets into an error.
use super::hosts::same_registry;
use super::{client, redact, text};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kernel::{Class, Fault, Result};
use proto::cri::AuthConfig;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// A token server that takes longer will not answer at all.
const PATIENCE: Duration = Duration::from_secs(30);

/// User name and secret of a request.
#[derive(Clone, Default)]
pub struct Credentials {
    user: String,
    secret: String,
    /// An OAuth refresh token.
    identity: String,
    /// A ready bearer token.
    bearer: String,
    /// The only host that may see them; empty = whoever stands for the registry.
    only: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials")
    }
}

/// `https://host/path` or `host/path`: the host.
fn host_of(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default()
}

impl Credentials {
    /// From CRI's `AuthConfig`, in containerd's order: user and password, identity token, `auth` (base64 of `user:password`), and beyond it registry
    /// token.
    pub fn new(auth: Option<&AuthConfig>) -> Result<Credentials> {
        let Some(auth) = auth else { return Ok(Credentials::default()) };
        let only = host_of(&auth.server_address).to_owned();
        let mut credentials = Credentials { only, ..Default::default() };
        if !auth.username.is_empty() {
            (credentials.user, credentials.secret) = (auth.username.clone(), auth.password.clone());
        } else if !auth.identity_token.is_empty() {
            credentials.identity = auth.identity_token.clone();
        } else if !auth.auth.is_empty() {
            let bytes = STANDARD.decode(auth.auth.trim()).map_err(|_| Fault::invalid_argument("auth.auth is not base64"))?;
            let text = String::from_utf8(bytes).map_err(|_| Fault::invalid_argument("auth.auth is not base64 of text"))?;
            let pair = text.split_once(':').ok_or_else(|| Fault::invalid_argument("auth.auth is not base64 of user:password"))?;
            (credentials.user, credentials.secret) = (pair.0.to_owned(), pair.1.trim_end_matches('\0').to_owned());
        } else {
            credentials.bearer = auth.registry_token.clone();
        }
        Ok(credentials)
    }
    /// Whether there is nothing to show.
    pub fn anonymous(&self) -> bool {
        self.user.is_empty() && self.identity.is_empty() && self.bearer.is_empty()
    }
    /// What this host may see of them.
    pub fn for_host(&self, authority: &str) -> Credentials {
        if self.only.is_empty() || same_registry(&self.only, authority) { self.clone() } else { Credentials::default() }
    }
    /// Without a challenge: a ready token.
    pub fn ready(&self) -> Option<String> {
        (!self.bearer.is_empty()).then(|| format!("Bearer {}", self.bearer))
    }
    fn basic(&self) -> Option<String> {
        let pair = format!("{}:{}", self.user, self.secret);
        (!self.user.is_empty()).then(|| format!("Basic {}", STANDARD.encode(pair)))
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Token {
    token: String,
    access_token: String,
}

/// The `Authorization` header that the challenges ask for; a bearer token before a password.
pub async fn answer(http: &reqwest::Client, challenges: &[String], repository: &str, credentials: &Credentials) -> Result<String> {
    let scheme = |c: &str| c.split(' ').next().unwrap_or_default().to_lowercase();
    if let Some(challenge) = challenges.iter().find(|c| scheme(c) == "bearer") {
        let parameters = parameters(challenge.split_once(' ').map_or("", |(_, rest)| rest));
        return token(http, &parameters, repository, credentials).await;
    }
    if challenges.iter().any(|c| scheme(c) == "basic") {
        return credentials.basic().ok_or_else(|| Fault::unauthenticated("the registry wants a user and a password"));
    }
    let schemes: Vec<String> = challenges.iter().map(|c| scheme(c)).collect();
    Err(Fault::unauthenticated(format!("the registry wants {schemes:?}, which is not supported")))
}

async fn token(http: &reqwest::Client, p: &BTreeMap<String, String>, repository: &str, credentials: &Credentials) -> Result<String> {
    let realm = p.get("realm").ok_or_else(|| Fault::unauthenticated("the registry's challenge names no realm"))?;
    let what = format!("token from {}", redact(realm));
    let mut url = reqwest::Url::parse(realm).map_err(|_| Fault::unauthenticated(format!("{what}: not a URL")))?;
    let scope = p.get("scope").cloned().unwrap_or_else(|| format!("repository:{repository}:pull"));
    let service = p.get("service").cloned().unwrap_or_default();
    let request = if credentials.identity.is_empty() {
        url.query_pairs_mut().append_pair("service", &service).append_pair("scope", &scope);
        match credentials.basic() {
            Some(basic) => http.get(url).header("Authorization", basic),
            None => http.get(url),
        }
    } else {
        let mut form = url.clone();
        form.set_query(None);
        form.query_pairs_mut().extend_pairs([
            ("grant_type", "refresh_token"),
            ("service", &service),
            ("client_id", "troupe"),
            ("scope", &scope),
            ("refresh_token", &credentials.identity),
        ]);
        let body = form.query().unwrap_or_default().to_owned();
        http.post(url).header("Content-Type", "application/x-www-form-urlencoded").body(body)
    };
    let exchange = async move {
        let response = request.send().await?;
        let status = response.status();
        Ok::<_, reqwest::Error>((status, response.bytes().await?))
    };
    let answer = client::run(tokio::time::timeout(PATIENCE, exchange)).await?;
    let answer = answer.map_err(|_| Fault::unavailable(format!("{what}: no answer within {PATIENCE:?}")))?;
    let (status, body) = answer.map_err(|e| Fault::unavailable(format!("{what}: {}", text(e))))?;
    if !status.is_success() {
        let class = if status.is_server_error() { Class::Unavailable } else { Class::Unauthenticated };
        return Err(Fault::new(class, format!("{what}: {status}")));
    }
    let token: Token = serde_json::from_slice(&body).map_err(|_| Fault::unauthenticated(format!("{what}: the answer is not JSON")))?;
    let token = if token.token.is_empty() { token.access_token } else { token.token };
    if token.is_empty() { Err(Fault::unauthenticated(format!("{what}: an answer without a token"))) } else { Ok(format!("Bearer {token}")) }
}

/// `a="x",b="y,z"`.
fn parameters(text: &str) -> BTreeMap<String, String> {
    let (mut all, mut rest) = (BTreeMap::new(), text);
    while let Some((key, after)) = rest.split_once('=') {
        let key = key.trim_matches([' ', ',']).to_lowercase();
        let (value, left) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        all.insert(key, value.to_owned());
        rest = left;
    }
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(change: impl FnOnce(&mut AuthConfig)) -> Credentials {
        let mut auth = AuthConfig::default();
        change(&mut auth);
        Credentials::new(Some(&auth)).unwrap()
    }

    #[test]
    fn challenges_are_read() {
        let p = parameters(r#"realm="https://a/token",service="reg",scope="repository:x:pull,push""#);
        assert_eq!((p["realm"].as_str(), p["scope"].as_str()), ("https://a/token", "repository:x:pull,push"));
    }

    #[test]
    fn every_form_of_credentials_in_its_order() {
        assert_eq!(of(|a| a.auth = "dXNlcjpwYXNz".into()).basic().unwrap(), "Basic dXNlcjpwYXNz");
        let all = of(|a| {
            (a.username, a.password, a.identity_token) = ("u".into(), "p".into(), "i".into());
            a.auth = "dXNlcjpwYXNz".into();
        });
        assert_eq!((all.basic().unwrap(), all.identity.as_str()), ("Basic dTpw".into(), ""));
        assert_eq!(of(|a| (a.identity_token, a.auth) = ("i".into(), "dXNlcjpwYXNz".into())).identity, "i");
        assert_eq!(of(|a| a.registry_token = "t".into()).ready().unwrap(), "Bearer t");
        assert!(of(|_| {}).anonymous());
    }

    #[test]
    fn credentials_stay_with_their_host_and_secrets_out_of_errors() {
        let docker = of(|a| (a.username, a.server_address) = ("u".into(), "https://index.docker.io/v1/".into()));
        assert!(!docker.for_host("registry-1.docker.io").anonymous());
        assert!(docker.for_host("mirror.example").anonymous());
        assert!(!of(|a| a.username = "u".into()).for_host("mirror.example").anonymous());
        for auth in ["%%secret%%", "c2VjcmV0", "/w=="] {
            let refused = Credentials::new(Some(&AuthConfig { auth: auth.into(), ..Default::default() })).unwrap_err();
            assert!(!refused.message.contains("secret"), "{refused}");
        }
    }
}
