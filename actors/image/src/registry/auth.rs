//! Answering a registry's 401: basic credentials and bearer tokens (`contracts/core.md` §7.5).
use base64::Engine;
use kernel::{Class, Fault, Result, ResultExt};
use proto::cri::AuthConfig;
use serde::Deserialize;
use std::collections::BTreeMap;

/// User name and secret of a request.
#[derive(Clone, Default)]
pub struct Credentials {
    user: String,
    secret: String,
    /// An OAuth refresh token.
    identity: String,
    /// A ready bearer token.
    bearer: String,
}

impl Credentials {
    /// From CRI's `AuthConfig`: user and password, `auth` (base64 of `user:password`), identity token or registry token.
    pub fn new(auth: Option<&AuthConfig>) -> Result<Credentials> {
        let Some(auth) = auth else { return Ok(Credentials::default()) };
        let mut credentials = Credentials {
            user: auth.username.clone(),
            secret: auth.password.clone(),
            identity: auth.identity_token.clone(),
            bearer: auth.registry_token.clone(),
        };
        if credentials.user.is_empty() && !auth.auth.is_empty() {
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(auth.auth.trim())
                .class(Class::InvalidArgument, "auth.auth is not base64")?;
            let text = String::from_utf8(bytes).class(Class::InvalidArgument, "auth.auth is not text")?;
            let (user, secret) = text.split_once(':').ok_or_else(|| Fault::invalid_argument("auth.auth is not base64 of user:password"))?;
            (credentials.user, credentials.secret) = (user.to_owned(), secret.trim_end_matches('\0').to_owned());
        }
        Ok(credentials)
    }
    /// Without a challenge: a ready token.
    pub fn ready(&self) -> Option<String> {
        (!self.bearer.is_empty()).then(|| format!("Bearer {}", self.bearer))
    }
    fn basic(&self) -> Option<String> {
        let pair = format!("{}:{}", self.user, self.secret);
        (!self.user.is_empty()).then(|| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Token {
    token: String,
    access_token: String,
}

/// The `Authorization` header that a challenge asks for.
pub async fn answer(client: &reqwest::Client, challenge: &str, repository: &str, credentials: &Credentials) -> Result<String> {
    let (scheme, rest) = challenge.split_once(' ').unwrap_or((challenge, ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return credentials.basic().ok_or_else(|| Fault::unauthenticated("the registry wants a user and a password"));
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Fault::unauthenticated(format!("the registry wants {scheme:?}, which is not supported")));
    }
    let parameters = parameters(rest);
    let realm = parameters.get("realm").ok_or_else(|| Fault::unauthenticated(format!("no realm in the challenge {challenge:?}")))?;
    let scope = parameters.get("scope").cloned().unwrap_or_else(|| format!("repository:{repository}:pull"));
    let service = parameters.get("service").cloned().unwrap_or_default();
    let request = if credentials.identity.is_empty() {
        let mut url = reqwest::Url::parse(realm).class(Class::Unauthenticated, realm)?;
        url.query_pairs_mut().append_pair("service", &service).append_pair("scope", &scope);
        let mut request = client.get(url);
        if let Some(basic) = credentials.basic() {
            request = request.header("Authorization", basic);
        }
        request
    } else {
        let form = [
            ("grant_type", "refresh_token"),
            ("service", &service),
            ("client_id", "troupe"),
            ("scope", &scope),
            ("refresh_token", &credentials.identity),
        ];
        let mut url = reqwest::Url::parse(realm).class(Class::Unauthenticated, realm)?;
        url.query_pairs_mut().extend_pairs(form);
        let body = url.query().unwrap_or_default().to_owned();
        url.set_query(None);
        client.post(url).header("Content-Type", "application/x-www-form-urlencoded").body(body)
    };
    let response = request.send().await.class(Class::Unavailable, format!("token from {realm}"))?;
    if !response.status().is_success() {
        return Err(Fault::unauthenticated(format!("token from {realm}: {}", response.status())));
    }
    let token: Token = response.json().await.class(Class::Unauthenticated, format!("token from {realm}"))?;
    let token = if token.token.is_empty() { token.access_token } else { token.token };
    if token.is_empty() { Err(Fault::unauthenticated(format!("{realm} answered without a token"))) } else { Ok(format!("Bearer {token}")) }
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

    #[test]
    fn challenges_and_credentials() {
        let p = parameters(r#"realm="https://a/token",service="reg",scope="repository:x:pull,push""#);
        assert_eq!((p["realm"].as_str(), p["scope"].as_str()), ("https://a/token", "repository:x:pull,push"));
        let auth = AuthConfig { auth: "dXNlcjpwYXNz".into(), ..Default::default() };
        assert_eq!(Credentials::new(Some(&auth)).unwrap().basic().unwrap(), "Basic dXNlcjpwYXNz");
        assert!(Credentials::new(Some(&AuthConfig { auth: "%%".into(), ..Default::default() })).is_err());
    }
}
